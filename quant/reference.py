"""The blockwise cast that defines every case: plain torch, one step a line, no speed.

    amax      = max |x| of each block                  block_amax
    scale     = scales_of(amax)                        scales.py; sticky.py where it is asked for
    data      = E4M3(clamp(x * scale, -448, 448))      cast_with_scale; nearest, ties to even

The products are taken in fp32, whatever the input is. Ragged edges behave as if the tensor were
padded with zeros; the padding is not stored. Every faster path (chunked.py, compiled.py,
triton_kernel.py) equals this one bit for bit. A block with NaN or Inf has a NaN scale and data
without meaning; the caller refuses it.

Source: FP8-RL (arXiv 2601.18150); DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from fp8rl.quant.scales import E4M3_MAX, ScaleFormat, scales_of
from fp8rl.quant.tensor import FP8_DTYPE


def blocked(x: Shaped[Tensor, "*lead n k"], block_size: tuple[int, int]) -> Tensor:
    """View [.., N, K], zero-padded to whole blocks, as [.., ceil(N/bn), bn, ceil(K/bk), bk]."""
    (n, k), (bn, bk) = x.shape[-2:], block_size
    if n % bn or k % bk:
        x = F.pad(x, (0, -k % bk, 0, -n % bn))
    *lead, n, k = x.shape
    return x.reshape(*lead, n // bn, bn, k // bk, bk)


def block_amax(
    x: Float[Tensor, "*lead n k"], block_size: tuple[int, int]
) -> Float32[Tensor, "*lead nb kb"]:
    """Return the largest |x| of each block in fp32; NaN where a block holds one. No empty `x`."""
    return blocked(x, block_size).abs().amax(dim=(-3, -1)).float()


def cast_with_scale(
    x: Float[Tensor, "*lead n k"],
    scale: Float32[Tensor, "*lead nb kb"],
    block_size: tuple[int, int],
) -> Shaped[Tensor, "*lead n k"]:
    """Return the E4M3 codes of `x` times the scale of its block."""
    blocks = blocked(x, block_size)
    scaled = torch.mul(blocks, scale[..., :, None, :, None])  # fp32: the scale's dtype wins
    codes = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(FP8_DTYPE)
    *lead, nb, bn, kb, bk = blocks.shape
    n, k = x.shape[-2:]
    return codes.view(*lead, nb * bn, kb * bk)[..., :n, :k].contiguous()


def reference_cast(
    x: Float[Tensor, "*lead n k"],
    block_size: tuple[int, int],
    scale_format: ScaleFormat,
    previous: Float32[Tensor, "*lead nb kb"] | None = None,
) -> tuple[Shaped[Tensor, "*lead n k"], Float32[Tensor, "*lead nb kb"]]:
    """Return `(data, scale_inv)` of a tensor that is not empty: E4M3 and fp32.

    previous: the `scale_inv` that sticky scales go on from.
    """
    scale, scale_inv = scales_of(block_amax(x, block_size), scale_format, previous)
    return cast_with_scale(x, scale, block_size), scale_inv
