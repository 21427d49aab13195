"""Sticky scales: a block keeps the power of two that it had while its amax stays within reach.

Let f be the block's fresh scale, the smallest power of two with amax <= 448 f (scales.py), and p
the one that it had. It gets

    p   where p is f or 2 f: amax still fits, and uses at least a quarter of the range
    f   otherwise

A block of zeros always has scale 1.0, one with NaN or Inf always NaN. The rule changes nothing that
it has settled: applied to its own result it gives it again.

Why: an amax that wavers around 448 * 2^k doubles and halves the fresh scale, and with it every code
of the block changes (16384 of them, where a step of training changes some forty). With sticky
scales it must halve for that, so a delta between two versions holds what training changed alone.
Such blocks are few: updates of mean size u carry one block in amax ln 2 / u over an edge, one in
10^5 for N(0, 0.02) weights at learning rate 1e-6, which adds half a percent to what changes.

Cost: a block at 2 f loses one binade at the bottom; everywhere else a code has its three bits of
mantissa as before. With every block at 2 f, the relative RMS error of Gaussian weights is 2.65 % as
with fresh scales, and 0.002 % of them round to zero, not 0.001 %. It shows only where an outlier
makes a block's amax thousands of times the other weights' size: theirs grows from 2.66 % to 2.75 %
at 4096 sigma, from 3.3 % to 5.7 % at 16384.

The codes and scales depend on the history of a tensor, not on its values alone: whoever wants the
same bytes needs the same previous scales.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from fp8rl.quant.errors import QuantFormatError


def sticky_scale_inv(
    amax: Float32[Tensor, "*blocks"],
    fresh: Float32[Tensor, "*blocks"],
    previous: Float32[Tensor, "*blocks"],
) -> Float32[Tensor, "*blocks"]:
    """Return the `scale_inv` of each block: `previous` where it is the double of `fresh`.

    `fresh` is that of `amax`: a power of two, NaN where `amax` is not finite.
    """
    return torch.where((previous == 2 * fresh) & (amax != 0), previous, fresh)


def check_previous(
    previous: Tensor, expected: tuple[int, ...], device: torch.device, scale_format: str, name: str
) -> None:
    """Raise QuantFormatError unless `previous` can be the pow2 scales of a tensor.

    expected: the shape of its scales. Powers of two from 2^-126 to 2^127 are.
    """
    found = (previous.dtype, tuple(previous.shape), previous.device, scale_format)
    if found != (torch.float32, expected, device, "pow2"):
        raise QuantFormatError(
            f"{name}: previous scales (dtype, shape, device, scale format) are {found}, expected "
            f"{(torch.float32, expected, device, 'pow2')}"
        )
    bits = previous.contiguous().view(torch.int32)
    bad = ((bits & 0x7FFFFF) != 0) | (bits <= 0) | (bits >= 0x7F800000)
    if bool(bad.any()):
        raise QuantFormatError(
            f"{name}: {int(bad.sum())} previous scale(s) are no powers of two from 2^-126 to "
            f"2^127, among them {float(previous[bad][0])}; pass the scale_inv of the last result"
        )
