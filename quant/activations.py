"""Activations as an FP8 kernel reads them: rounded to E4M3 in 1 x 128 groups, and back in BF16.

    round_activations(x) = dequantize_blockwise(quantize_activations(x), torch.bfloat16)

bit for bit, in a tenth of the time, for it is asked for in every linear of every forward: by an
engine that simulates W8A8, and by the trainer that is aligned with it. Nothing is lost in between:
an E4M3 number times a power of two has 4 significant bits, and BF16 holds 8.

E4M3 keeps 3 bits behind the leading one, down to 2^-6, and steps of 2^-9 below. So with 2^e the
group's scale and E = max(floor(log2 |x|), e - 6), x is rounded to a multiple of 2^(E - 3). In BF16
the numbers around 1.5 * 2^(E + 4) are that far apart:

    (x + 1.5 * 2^(E + 4)) - 1.5 * 2^(E + 4)          nearest, ties to even: the addition rounds

The exponents are read from the bits, as in scales.py. The sum must be rounded to BF16 before the
subtraction, which code that torch.compile fuses does not do: to a compiler this is one operator,
that it cannot look into.

Left out: groups whose amax is below 2^-112 and not 0, which come out as multiples of 2^-130 or
coarser; fp32 scales; inputs other than BF16 (`quantize_activations` has them all).
"""

import torch
from jaxtyping import BFloat16
from torch import Tensor

from fp8rl.quant.errors import QuantFormatError

GROUP = 128

_MANTISSA_BITS = 7
_MAGNITUDE = 0x7FFF
_EXPONENT = 0x7F80
_PAST_448 = 0x1F  # carries into the exponent where the mantissa is above that of 448, 1.75
_SCALE = 8 + 6  # from the amax's exponent, so raised, to that of E4M3's smallest normal number
_SHIFT = (4 << _MANTISSA_BITS) + 0x40  # from 2^E to 1.5 * 2^(E + 4)
_TOO_LARGE = (123 + 127) << _MANTISSA_BITS  # 2^123: above it 1.5 * 2^(E + 4) may overflow


def round_activations(x: BFloat16[Tensor, "*tokens k"]) -> BFloat16[Tensor, "*tokens k"]:
    """Round each group of 128 channels to the E4M3 values that its power-of-two scale allows.

    x: bf16 [.., K], K a multiple of 128. A group with NaN, Inf or a magnitude of 2^123 and above
    becomes NaN as a whole.

    Raises QuantFormatError for another dtype or K.
    """
    if x.dtype != torch.bfloat16 or x.shape[-1] % GROUP:
        raise QuantFormatError(
            f"activations must be bfloat16 [.., K] with K a multiple of {GROUP}, found {x.dtype} "
            f"{tuple(x.shape)}"
        )
    result: Tensor = _opaque(x) if torch.compiler.is_compiling() else _round(x)
    return result


def _round(x: Tensor) -> Tensor:
    groups = x.view(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    bits = groups.view(torch.int16)
    amax = (bits & _MAGNITUDE).amax(-1, keepdim=True)
    smallest = ((amax + _PAST_448) & _EXPONENT) - (_SCALE << _MANTISSA_BITS)
    shift = (bits & _EXPONENT).clamp_(min=smallest).add_(_SHIFT).view(torch.bfloat16)
    rounded = (groups + shift).sub_(shift)
    signed = rounded.view(torch.int16).bitwise_or_(bits & ~_MAGNITUDE).view(torch.bfloat16)
    too_large = amax >= _TOO_LARGE
    if bool(too_large.any()):
        signed.masked_fill_(too_large, torch.nan)
    return signed.view(x.shape)


@torch.library.custom_op("fp8rl::round_activations", mutates_args=())
def _opaque(x: Tensor) -> Tensor:
    return _round(x.contiguous())  # laid out as the operator promises below


@_opaque.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
