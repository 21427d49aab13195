"""The FP8 bytes of a model in one run, as trainer and engine of `fp8rl bench sync` see them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
