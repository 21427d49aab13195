"""Blockwise FP8: the reference cast, in plain torch, that defines every case.

    amax  = max |x| of each block, in fp32         (scales.py: amax -> scale, scale_inv)
    data  = E4M3(clamp(x * scale, -448, 448))      round to nearest, ties to even

* Ragged edges behave as if the tensor were padded with zeros; the padding is not stored.
* 3-D tensors (experts): each matrix alone. Empty tensors: empty results.
* Zero block: data 0 (its signs kept), scale 1.0.
* NaN or Inf anywhere: an error that names the tensor. Nothing is returned.

In `pow2` format the product is exact, so the only rounding is the cast. Dequantizing and quantizing
again never changes a value. Nor does it change a byte, but for a block whose largest code is
exactly 224 (an amax in (224, 232] * 2^k): 224 also fits at half the scale, where the same values
have other codes. (A block that rounded to nothing at the smallest scale becomes a zero block.)
Magnitudes of 248 * 2^120 (3.30e38) and above round to 2^128, which fp32 reads back as Inf.

Source: FP8-RL (arXiv 2601.18150); DeepSeek-V3 (arXiv 2412.19437), section 3.3. Left out: fast
paths, which have to equal this one bit for bit.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fp8rl.quant.errors import (
    NonFiniteActivationError,
    NonFiniteError,
    NonFiniteWeightError,
    QuantFormatError,
)
from fp8rl.quant.scales import E4M3_MAX, ScaleFormat, scales_of
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor, check_format, scale_shape

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_blockwise(
    weight: Float[Tensor, "*experts n k"],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_format: ScaleFormat = "pow2",
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize a weight [N, K] or stacked experts [E, N, K] to E4M3 with a scale for each block.

    `weight` is bf16, fp16 or fp32; quantizing fp32 master weights and quantizing their bf16 export
    are different things. `name` is for the error message.

    Raises NonFiniteWeightError on NaN or Inf, QuantFormatError on another dtype, rank or format.
    """
    if weight.ndim not in (2, 3):
        raise QuantFormatError(
            f"{name}: a weight must be [N, K] or [E, N, K], found shape {tuple(weight.shape)}"
        )
    return _quantize(weight, block_size, scale_format, name, NonFiniteWeightError)


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
    return _quantize(x, (1, group_size), scale_format, "activations", NonFiniteActivationError)


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


def _quantize(
    x: Tensor,
    block_size: tuple[int, int],
    scale_format: ScaleFormat,
    name: str,
    error: type[NonFiniteError],
) -> QuantizedTensor:
    check_format(block_size, scale_format)
    if x.dtype not in _DTYPES:
        raise QuantFormatError(f"{name}: dtype must be one of {_DTYPES}, found {x.dtype}")
    x = x.detach()
    n, k = x.shape[-2:]
    scales = scale_shape(tuple(x.shape), block_size)
    if x.numel() == 0:
        data = torch.empty(x.shape, dtype=FP8_DTYPE, device=x.device)
        empty = torch.empty(scales, dtype=torch.float32, device=x.device)
        return QuantizedTensor(data, empty, block_size, scale_format)
    blocks = _blocked(x, block_size)
    amax = blocks.abs().amax(dim=(-3, -1)).float()
    if not bool(torch.isfinite(amax).all()):  # amax carries NaN and Inf of any element
        raise _non_finite(x, name, error)
    scale, scale_inv = scales_of(amax, scale_format)
    scaled = torch.mul(blocks, scale[..., :, None, :, None])  # fp32, whatever the input is
    codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(FP8_DTYPE)
    rows, columns = scales[-2] * block_size[0], scales[-1] * block_size[1]
    data = codes.view(*x.shape[:-2], rows, columns)[..., :n, :k].contiguous()
    return QuantizedTensor(data, scale_inv, block_size, scale_format)


def _blocked(x: Tensor, block_size: tuple[int, int]) -> Tensor:
    """View [.., N, K], zero-padded to whole blocks, as [.., N/bn, bn, K/bk, bk]."""
    (n, k), (bn, bk) = x.shape[-2:], block_size
    if n % bn or k % bk:
        x = F.pad(x, (0, -k % bk, 0, -n % bn))
    *lead, n, k = x.shape
    return x.reshape(*lead, n // bn, bn, k // bk, bk)


def _non_finite(x: Tensor, name: str, error: type[NonFiniteError]) -> NonFiniteError:
    bad = (~torch.isfinite(x)).nonzero()
    first = tuple(int(i) for i in bad[0])
    return error(name, len(bad), first, float(x[first]))
