"""A model's weights as runs of bytes, for both sides of `fp8rl bench sync`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8rl.quant import EngineTensor
from fp8rl.sync.fingerprint import fingerprint
from fp8rl.sync.manifest import DTYPE_NAMES, DTYPES, DtypeName, align

Layout = Sequence[tuple[str, DtypeName, Sequence[int], int]]  # name, dtype, shape, first byte


def lay_out(tensors: Iterable[EngineTensor]) -> tuple[Layout, int]:
    """Give each tensor its place; tells the bytes of all, too."""
    layout: list[tuple[str, DtypeName, Sequence[int], int]] = []
    end = 0
    for name, dtype, shape in tensors:
        layout.append((name, DTYPE_NAMES[dtype], list(shape), end))
        end = align(end + math.prod(shape) * dtype.itemsize)
    return layout, end


def views(data: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors that lie in the bytes ``data``, sharing their memory."""
    found = {}
    for name, dtype, shape, start in layout:
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        found[name] = data[start : start + nbytes].view(DTYPES[dtype]).view(*shape)
    return found


def timed_fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fingerprint tensors: their digests, and the seconds it took."""
    began = time.perf_counter()
    digests = [fingerprint(tensor) for tensor in tensors.values()]
    return {"seconds": time.perf_counter() - began, "digests": digests}


class Bucket:
    """BF16 tensors as they come, in order, end to end; cast to FP8 where the engine holds that."""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        quantized: Collection[str],
        cast: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        """Await tensors of these shapes; ``cast`` makes codes and scales of the ``quantized``."""
        self._shapes, self._quantized, self._cast = shapes, quantized, cast
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.tensors: dict[str, Tensor] = {}
        self.seconds = 0.0  # spent casting
        self._waiting = iter(self._shapes.items())
        self._part = torch.empty(0, dtype=torch.uint8)
        self._next()

    def take(self, data: Tensor) -> None:
        """Take in the next bytes; nothing refers to them afterwards."""
        while len(data):
            piece, data = data[: self._missing], data[self._missing :]
            if len(piece) == self._nbytes:
                self._accept(piece, owned=False)
                continue
            if self._missing == self._nbytes:
                self._part = torch.empty(self._nbytes, dtype=torch.uint8)
            begun = self._nbytes - self._missing
            self._part[begun : begun + len(piece)] = piece
            self._missing -= len(piece)
            if self._missing == 0:
                self._accept(self._part, owned=True)

    def _accept(self, data: Tensor, *, owned: bool) -> None:
        name, tensor = self._name, data.view(torch.bfloat16).view(self._shape)
        if name in self._quantized:
            began = time.perf_counter()
            codes, scales = self._cast(tensor)
            self.seconds += time.perf_counter() - began
            self.tensors |= {name: codes, f"{name}_scale_inv": scales}
        else:
            self.tensors[name] = tensor if owned else tensor.clone()
        self._next()

    def _next(self) -> None:
        self._name, self._shape = next(self._waiting, ("", ()))
        self._nbytes = self._missing = 2 * math.prod(self._shape)
