"""Blockwise FP8: weights and activations to E4M3 with a scale for each block, and back.

    data[i, j] = E4M3(clamp(x[i, j] * scale[b], -448, 448)),   scale_inv[b] = 1 / scale[b]

for b the block of (i, j): 128 x 128 for weights, 1 x 128 for activations. What each case gives is
defined in reference.py (the cast) and scales.py (amax -> scale); the work is done by the fastest
path that the device has, all of them equal to the reference bit for bit:

    CUDA          triton_kernel.py   one read of the input
    CPU, large    compiled.py        torch.compile
    otherwise     chunked.py         the reference, a few rows of blocks at a time

* Ragged edges behave as if the tensor were padded with zeros; the padding is not stored.
* 3-D tensors (experts): each matrix alone. Empty tensors: empty results.
* Zero block: data 0 (its signs kept), scale 1.0.
* NaN or Inf anywhere: an error that names the tensor. Nothing is returned.

In `pow2` format the product is exact, so the only rounding is the cast. Dequantizing and quantizing
again never changes a value. Nor does it change a byte, but for a block whose largest code is
exactly 224 (an amax in (224, 232] * 2^k): 224 also fits at half the scale, where the same values
have other codes. (A block that rounded to nothing at the smallest scale becomes a zero block.)
Magnitudes of 248 * 2^120 (3.30e38) and above round to 2^128, which fp32 reads back as Inf.

Source: FP8-RL (arXiv 2601.18150); DeepSeek-V3 (arXiv 2412.19437), section 3.3. Left out: parts of a
tensor that share a block (sharded.py), MXFP8 (mxfp8.py).
"""

from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fp8rl.quant.chunked import chunked_cast
from fp8rl.quant.compiled import compiled_cast
from fp8rl.quant.errors import (
    NonFiniteActivationError,
    NonFiniteError,
    NonFiniteWeightError,
    QuantFormatError,
)
from fp8rl.quant.scales import ScaleFormat
from fp8rl.quant.sticky import check_previous
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor, check_format, scale_shape

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

FP32Source = Literal["master", "export"]


def quantize_blockwise(
    weight: Float[Tensor, "*experts n k"],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_format: ScaleFormat = "pow2",
    name: str = "weight",
    fp32_as: FP32Source | None = None,
    out: QuantizedTensor | None = None,
    previous_scale_inv: Float32[Tensor, "*blocks"] | None = None,
) -> QuantizedTensor:
    """Quantize a weight [N, K] or stacked experts [E, N, K] to E4M3 with a scale for each block.

    weight: bf16, fp16 or fp32, on any device.
    name: of the tensor, for messages.
    fp32_as: what an fp32 weight stands for, to be said for every fp32 weight because the results
        differ. "master": these values are quantized (as Transformer Engine casts its FP8 primary
        weights). "export": they are rounded to bf16 first, as a BF16 checkpoint would hold them.
    out: where to write, contiguous; returned. After an error it holds nothing of use.
    previous_scale_inv: the scales this weight had last time, from which its scales go on (sticky.py
        has the rule); `out.scale_inv` may be they. None: scales of this weight's values alone.

    Raises NonFiniteWeightError on NaN or Inf; QuantFormatError on another dtype, rank or format, an
    fp32 weight without `fp32_as`, and an `out` or previous scales that do not fit.
    """
    values = weight_values(weight, fp32_as, name)
    return _quantize(
        values, block_size, scale_format, name, NonFiniteWeightError, out, previous_scale_inv
    )


def quantize_activations(
    x: Float[Tensor, "*tokens k"],
    *,
    group_size: int = 128,
    scale_format: ScaleFormat = "pow2",
) -> QuantizedTensor:
    """Quantize activations [.., T, K] to E4M3, one scale for each token and `group_size` channels.

    `x` is bf16, fp16 or fp32. The result has block_size (1, group_size) and scale_inv
    [.., T, ceil(K / group_size)].

    Raises NonFiniteActivationError on NaN or Inf, QuantFormatError on another dtype, rank or
    format.
    """
    if x.ndim < 2:
        raise QuantFormatError(f"activations must be [.., T, K], found shape {tuple(x.shape)}")
    block_size = (1, group_size)
    return _quantize(x, block_size, scale_format, "activations", NonFiniteActivationError, None)


def dequantize_blockwise(
    q: QuantizedTensor, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*lead n k"]:
    """Return `data * scale_inv` as `dtype` (bf16, fp16 or fp32): one fp32 product, then the cast.

    In `pow2` format fp32 is exact, and so is bf16 for scales of 2^-124 and above.
    """
    if dtype not in _DTYPES:
        raise QuantFormatError(f"dtype must be one of {_DTYPES}, found {dtype}")
    n, k = q.shape[-2:]
    scale = q.scale_inv.repeat_interleave(q.block_size[0], dim=-2)[..., :n, :]
    scale = scale.repeat_interleave(q.block_size[1], dim=-1)[..., :k]
    return q.data.float().mul_(scale).to(dtype)


def empty_quantized(
    shape: tuple[int, ...],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_format: ScaleFormat = "pow2",
    device: torch.device | str = "cpu",
) -> QuantizedTensor:
    """Allocate, without values, the result of quantizing a tensor of `shape`."""
    check_format(block_size, scale_format)
    data = torch.empty(shape, dtype=FP8_DTYPE, device=device)
    scales = torch.empty(scale_shape(shape, block_size), dtype=torch.float32, device=device)
    return QuantizedTensor(data, scales, block_size, scale_format)


def weight_values(weight: Tensor, fp32_as: FP32Source | None, name: str) -> Tensor:
    """Return the values to quantize of a weight, detached; QuantFormatError where undefined."""
    if weight.ndim not in (2, 3):
        raise QuantFormatError(
            f"{name}: a weight must be [N, K] or [E, N, K], found shape {tuple(weight.shape)}"
        )
    if weight.dtype not in _DTYPES:
        raise QuantFormatError(f"{name}: dtype must be one of {_DTYPES}, found {weight.dtype}")
    weight = weight.detach()
    if weight.dtype != torch.float32 or fp32_as == "master":
        return weight
    if fp32_as == "export":
        return weight.to(torch.bfloat16)
    raise QuantFormatError(
        f"{name}: is fp32, and fp32_as is {fp32_as!r}; say fp32_as='master' to quantize these "
        "values or 'export' to round them to bf16 first: the two give different weights"
    )


def _quantize(
    x: Tensor,
    block_size: tuple[int, int],
    scale_format: ScaleFormat,
    name: str,
    error: type[NonFiniteError],
    out: QuantizedTensor | None,
    previous: Tensor | None = None,
) -> QuantizedTensor:
    check_format(block_size, scale_format)
    if x.dtype not in _DTYPES:
        raise QuantFormatError(f"{name}: dtype must be one of {_DTYPES}, found {x.dtype}")
    x = x.detach()
    if out is None:
        out = empty_quantized(
            tuple(x.shape), block_size=block_size, scale_format=scale_format, device=x.device
        )
    else:
        _check_out(x, block_size, scale_format, name, out)
    if previous is not None:
        check_previous(previous, tuple(out.scale_inv.shape), x.device, scale_format, name)
        out.scale_inv.copy_(previous)
    if x.numel() == 0:
        return out
    _cast(x, out, sticky=previous is not None)
    if not bool(torch.isfinite(out.scale_inv).all()):
        raise _non_finite(x, name, error)
    return out


def _cast(x: Tensor, out: QuantizedTensor, sticky: bool) -> None:
    """Quantize `x` into `out` by the fastest path there is; sticky: `out` has previous scales."""
    if x.is_cuda:
        from fp8rl.quant.triton_kernel import runs_on, triton_cast

        if runs_on(x.device):
            return triton_cast(x, out, sticky)
    elif compiled_cast(x, out, sticky):
        return None
    return chunked_cast(x, out, sticky)


def _check_out(
    x: Tensor,
    block_size: tuple[int, int],
    scale_format: ScaleFormat,
    name: str,
    out: QuantizedTensor,
) -> None:
    found = (out.shape, out.block_size, out.scale_format, out.data.device)
    expected = (tuple(x.shape), block_size, scale_format, x.device)
    if found != expected:
        raise QuantFormatError(
            f"{name}: out is (shape, block size, scale format, device) {found}, expected {expected}"
        )
    if not (out.data.is_contiguous() and out.scale_inv.is_contiguous()):
        raise QuantFormatError(f"{name}: out must be contiguous in data and in scale_inv")


def _non_finite(x: Tensor, name: str, error: type[NonFiniteError]) -> NonFiniteError:
    bad = (~torch.isfinite(x)).nonzero()
    first = tuple(int(i) for i in bad[0])
    return error(name, len(bad), first, float(x[first]))
