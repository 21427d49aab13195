"""From the largest magnitude of a block to its scale: the two scale formats, every case defined.

Let `amax` be the largest |x| of a block in fp32 and 448 the largest finite E4M3 value. A block is
stored as `data = E4M3(x * scale)` and read back as `data * scale_inv`.

    pow2:  scale_inv = 2^ceil(log2(amax / 448)),  scale = 1 / scale_inv          (both exact)
    fp32:  scale     = 448 / amax,                scale_inv = 1 / scale          (one rounding each)

`pow2` is the rule on which Transformer Engine, DeepGEMM, vLLM and Hugging Face agree. It is read
from the exponent bits: 448 = 1.75 * 2^8, so with amax = m * 2^e and 1 <= m < 2 the exponent is
e - 8 for m <= 1.75 and e - 7 above. An fp32 log2 rounds down for amax one step above 448 * 2^k, and
the block would then overflow. `fp32` is Transformer Engine's rule.

Small amax: `scale_inv` is at least 2^-126, the smallest normal fp32 number, in both formats, so no
kernel that flushes denormals can turn a scale into 0. This bounds blocks with amax < 5.3e-36 only.
A block of zeros has scale 1.0. A block with NaN or Inf has scale NaN, so that looking at the scales
finds it.

Source: Transformer Engine, common/recipe (compute_scale_from_amax); DeepGEMM, utils/math. Left out:
E8M0 bytes (mxfp8.py), which store the same exponent without its fp32 wrapping.
"""

from typing import Final, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from fp8rl.quant.sticky import sticky_scale_inv

ScaleFormat = Literal["pow2", "fp32"]

E4M3_MAX: Final = 448.0

_MANTISSA_BITS: Final = 23
_MANTISSA_MASK: Final = 0x7FFFFF
_MANTISSA_OF_448: Final = 0x600000  # 448 = 1.75 * 2^8
_BIAS: Final = 127
_MIN_EXPONENT: Final = -126


def pow2_scale_inv(amax: Float32[Tensor, "*blocks"]) -> Float32[Tensor, "*blocks"]:
    """Return the smallest power of two, at least 2^-126, that brings `amax` to 448 or less.

    `amax` is fp32 and not negative; zero gives 1.0, Inf and NaN give NaN.
    """
    bits = amax.contiguous().view(torch.int32)
    above = (bits & _MANTISSA_MASK) > _MANTISSA_OF_448
    exponent = (bits >> _MANTISSA_BITS) - _BIAS - 8 + above.to(torch.int32)
    exponent = exponent.clamp(min=_MIN_EXPONENT)
    scale_inv = ((exponent + _BIAS) << _MANTISSA_BITS).view(torch.float32)
    scale_inv = torch.where(amax == 0, 1.0, scale_inv)
    return torch.where(torch.isfinite(amax), scale_inv, torch.nan)


def scales_of(
    amax: Float32[Tensor, "*blocks"],
    scale_format: ScaleFormat,
    previous: Float32[Tensor, "*blocks"] | None = None,
) -> tuple[Float32[Tensor, "*blocks"], Float32[Tensor, "*blocks"]]:
    """Return `(scale, scale_inv)`, what to multiply by when quantizing and when dequantizing.

    previous: the `scale_inv` that sticky scales (sticky.py) go on from; with `pow2` alone.
    """
    one = torch.ones((), dtype=torch.float32, device=amax.device)
    if scale_format == "pow2":
        scale_inv = pow2_scale_inv(amax)
        if previous is not None:
            scale_inv = sticky_scale_inv(amax, scale_inv, previous)
        return torch.div(one, scale_inv), scale_inv
    # A tensor on the left: torch makes `448.0 / amax` a reciprocal and a product, rounded twice.
    scale = torch.div(one * E4M3_MAX, amax).clamp(max=2.0**-_MIN_EXPONENT)
    scale = torch.where(amax == 0, one, scale)
    scale = torch.where(torch.isfinite(amax), scale, torch.nan)
    return scale, torch.div(one, scale)
