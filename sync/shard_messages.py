"""How parts of tensors lie in a message between two trainer ranks, and how wholes are made of them.

    plane      what moves of a tensor: itself, or E4M3 data and the scales of its blocks
    message    the planes of one rank's parts, one after another, each at a multiple of 16 bytes

Sender and receiver know all boxes, so they lay out a message alike and it carries no header. A
plane that one rank holds whole is not copied on arrival: it stays where it was received.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import torch
from torch import Tensor

from fp8rl.quant import Box
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape

_ALIGNMENT: Final = 16


@dataclass(frozen=True)
class Plane:
    """One rank's box of something that moves. shape: of the whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return prod(self.box.shape) * self.dtype.itemsize


def planes(shape: tuple[int, ...], dtype: torch.dtype, box: Box) -> list[Plane]:
    """Return what moves of a `box` of a tensor of `shape`; E4M3 stands for quantized, with scales.

    Scales are those of all blocks that the box touches.
    """
    data = Plane(dtype, shape, box)
    if dtype != FP8_DTYPE:
        return [data]
    return [data, Plane(torch.float32, scale_shape(shape, BLOCK_SIZE), box.blocks(BLOCK_SIZE))]


def message_bytes(parts: Iterable[Plane]) -> int:
    """Return the size of a message of these planes."""
    return sum(_aligned(plane.nbytes) for plane in parts)


def pack(parts: Sequence[Plane], tensors: Iterable[Tensor], device: torch.device | None) -> Tensor:
    """Write planes into one new uint8 message on `device`."""
    message = torch.empty(message_bytes(parts), dtype=torch.uint8, device=device)
    for place, tensor in zip(unpack(parts, message), tensors, strict=True):
        place.copy_(tensor)
    return message


def unpack(parts: Iterable[Plane], message: Tensor) -> list[Tensor]:
    """Return the planes of a message, as views of it."""
    views, start = [], 0
    for plane in parts:
        flat = message[start : start + plane.nbytes]
        views.append(flat.view(plane.dtype).view(plane.box.shape))
        start += _aligned(plane.nbytes)
    return views


def joined(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: Sequence[tuple[Sequence[Plane], Sequence[Tensor]]],
    device: torch.device | None,
) -> list[Tensor]:
    """Put the parts of a tensor together, plane by plane, on `device` (None: where they lie)."""
    if len(parts) == 1:
        _, tensors = parts[0]
        return [tensor if device is None else tensor.to(device) for tensor in tensors]
    everything = planes(shape, dtype, Box((0,) * len(shape), shape))
    wholes = [torch.empty(p.shape, dtype=p.dtype, device=device) for p in everything]
    for places, tensors in parts:
        for whole, place, tensor in zip(wholes, places, tensors, strict=True):
            whole[place.box.slices].copy_(tensor)
    return wholes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
