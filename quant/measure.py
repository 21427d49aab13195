"""How far a quantized tensor is from its original: one measure, three readings of it.

    calc_diff    = 1 - 2 <x, y> / (<x, x> + <y, y>)       DeepGEMM's measure; 0 for equal tensors
    relative_rms = |x - y| / |x|                          the error as a fraction of the signal
    sqnr_db      = -20 log10(relative_rms)                the same, in decibels

All sums are over the whole tensor in float64. calc_diff is about relative_rms^2 / 2 for small
errors. Source: DeepGEMM, testing/numeric. Left out: errors of each block or element.
"""

import math
from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor

from fp8rl.quant.errors import QuantFormatError


class QuantError(NamedTuple):
    """Distance of an approximation from its reference; see the module for the formulas."""

    calc_diff: float
    relative_rms: float
    sqnr_db: float


def measure_error(
    reference: Shaped[Tensor, "*shape"], approximation: Shaped[Tensor, "*other"]
) -> QuantError:
    """Compare two tensors of one shape, any dtypes.

    Equal tensors, also of zeros, give (0, 0, inf); a zero reference with another approximation
    gives (1, inf, -inf). Raises QuantFormatError where the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise QuantFormatError(
            f"reference {tuple(reference.shape)} and approximation {tuple(approximation.shape)} "
            "must have one shape"
        )
    x, y = reference.double(), approximation.double()
    energy = float((x * x).sum())
    noise = float((x - y).square().sum())
    if noise == 0.0:
        return QuantError(0.0, 0.0, math.inf)
    # 1 - 2<x,y>/(<x,x>+<y,y>) = |x-y|^2/(<x,x>+<y,y>), without the cancellation.
    diff = noise / (energy + float((y * y).sum()))
    if energy == 0.0:
        return QuantError(diff, math.inf, -math.inf)
    return QuantError(diff, math.sqrt(noise / energy), -10 * math.log10(noise / energy))
