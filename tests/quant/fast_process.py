"""A process of its own for the fast paths: `python fast_process.py` prints what it saw as JSON.

warnings     what fp8rl warned of
digests      of the bytes of some results
peaks        by case: MiB that quantizing took beyond the input and the preallocated result;
             "reference" is that of the plain cast, to show that the measure sees a copy
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fp8rl.quant import (
    QuantizedTensor,
    empty_quantized,
    quantize_activations,
    quantize_blockwise,
    quantize_mxfp8,
)
from fp8rl.quant.reference import reference_cast

BIG = (4096, 4096)  # an fp32 copy is 64 MiB


def peak_mib() -> float:
    """The most memory this process has held."""
    line = next(s for s in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in s)
    return int(line.split()[1]) / 1024


def extra_mib(call: Callable[[], object]) -> float:
    """How far memory rises above what is held, while `call` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = peak_mib()
    call()
    return peak_mib() - before


def peaks() -> dict[str, float]:
    """Of quantizing big weights into results that are there already."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (0, 70):
            x, out = big_weight(dtype, rows)
            quantize_blockwise(x[:512], fp32_as="master")  # compiled, if anything is
            cast = partial(quantize_blockwise, x, fp32_as="master", out=out)
            found[f"{dtype}, {rows} rows more"] = extra_mib(cast)
    x, _ = big_weight(torch.bfloat16, 0)
    return {**found, "reference": extra_mib(lambda: reference_cast(x, (128, 128), "pow2"))}


def big_weight(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, QuantizedTensor]:
    """A weight and the place for its result, all of their memory touched."""
    shape = (BIG[0] + rows, BIG[1])
    x = torch.full(shape, 0.02, dtype=dtype)
    out = empty_quantized(shape)
    out.data.view(torch.uint8).fill_(0)
    out.scale_inv.fill_(0)
    return x, out


def digests() -> list[str]:
    """Of 2^20 elements, so that the compiled path is asked, of each kind, and of a small tensor."""
    x = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:40, :300] = 0.0
    results = []
    for q in (
        *(quantize_blockwise(x), quantize_blockwise(x), quantize_blockwise(x[:99, :99])),
        *(quantize_activations(x), quantize_mxfp8(x)),
    ):
        parts = (q.data.view(torch.uint8), q.scale_inv.view(torch.uint8))
        hashed = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts))
        results.append(hashed.hexdigest())
    return results


def main() -> None:
    """Print one JSON object."""
    torch.set_num_threads(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = digests()
        extra = peaks()
    told = [str(w.message) for w in caught if "fp8rl" in str(w.message)]
    json.dump({"warnings": told, "digests": found, "peaks": extra}, sys.stdout)


if __name__ == "__main__":
    main()
