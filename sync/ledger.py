"""What was published last, byte for byte, in the trainer's host memory: the base of deltas.

One buffer holds every engine tensor (FP8 data, scales, the rest) at a fixed place, laid out once
from the plan. A pass over the weights writes the new bytes in; the ledger then stands for that
version, whether or not the engines took it. Which version an engine holds is known by its digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.quant import EngineTensor
from fp8rl.sync.manifest import align


@dataclass(frozen=True)
class _Slot:
    """Where one engine tensor lies in the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Ledger:
    """The bytes of one model's engine tensors."""

    def __init__(self, tensors: Iterable[EngineTensor]) -> None:
        self._slots: dict[str, _Slot] = {}
        end = 0
        for name, dtype, shape in tensors:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._slots[name] = _Slot(dtype, tuple(shape), end, nbytes)
            end = align(end + nbytes)
        self._bytes = torch.zeros(end, dtype=torch.uint8)

    def raw(self, name: str) -> UInt8[Tensor, " n"]:
        """A tensor's bytes; shares the ledger's memory."""
        slot = self._slots[name]
        return self._bytes[slot.start : slot.start + slot.nbytes]

    def tensor(self, name: str) -> Tensor:
        """A tensor in its dtype and shape; shares the ledger's memory."""
        slot = self._slots[name]
        return self.raw(name).view(slot.dtype).view(slot.shape)
