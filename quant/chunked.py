"""The cast on any device without a compiler: the reference, a few rows of blocks at a time.

A chunk's fp32 products stay in the cache, so this is some four times as fast as casting the whole
tensor, and needs no memory that grows with it. The amax is taken of the magnitude's bits: for
floats that are not negative their order is that of the integers, NaN above all, and integers are
compared faster.

Left out: anything that compiles.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fp8rl.quant.reference import blocked, cast_with_scale
from fp8rl.quant.scales import scales_of
from fp8rl.quant.tensor import QuantizedTensor

_CHUNK = 2**20  # elements; their fp32 products are 4 MiB

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def chunked_cast(x: Float[Tensor, "*lead n k"], out: QuantizedTensor, sticky: bool = False) -> None:
    """Quantize `x` (bf16, fp16 or fp32, not empty) into `out`, in `out`'s format.

    sticky: `out` holds the previous scales, from which sticky scales go on.
    """
    n, k = x.shape[-2:]
    block_size = out.block_size
    rows = max(_CHUNK // k // block_size[0], 1) * block_size[0]
    scale_rows = rows // block_size[0]
    matrices = zip(
        x.reshape(-1, n, k),
        out.data.view(-1, n, k),
        out.scale_inv.view(-1, *out.scale_inv.shape[-2:]),
        strict=True,
    )
    for matrix, data, scale_inv in matrices:
        for chunk, codes, scales in zip(
            matrix.split(rows), data.split(rows), scale_inv.split(scale_rows), strict=True
        ):
            previous = scales if sticky else None
            scale, inverse = scales_of(_amax(chunk, block_size), out.scale_format, previous)
            codes.copy_(cast_with_scale(chunk, scale, block_size))
            scales.copy_(inverse)


def _amax(x: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The same as `block_amax`."""
    bits_dtype = _BITS[x.dtype]
    bits = x.contiguous().view(bits_dtype) & torch.iinfo(bits_dtype).max  # the sign bit cleared
    return blocked(bits, block_size).amax(dim=-3).amax(dim=-1).view(x.dtype).float()
