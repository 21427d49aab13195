"""How often a stored value changes, from the update of its master alone.

A master x moves by u; what is stored is the nearest of a grid whose spacing at x is d(x). If x lies
anywhere between two points of the grid with equal chance, a border between cells lies in the way
with chance |u| / d(x), or for certain where |u| is larger, so

    expected share changed = mean over the elements of min(1, |u| / d(x))

    BF16   d(x) = 2^(floor(log2 |x|) - 7)
    FP8    d(x) = s 2^(max(floor(log2 |x / s|), -6) - 3)             s: the block's scale_inv

For N(0, sigma) weights every binade below sigma holds half as many weights as the one above, of
half the spacing, so each adds as many changes: E|u| / sigma times about 100 in BF16 for each of the
binades from sigma down to where d(x) = |u|. FP8's cells are 16 times as wide, and it has no binades
below its subnormal numbers: about a tenth of the share.

That a border comes from rounding twice (master to BF16 to FP8) moves the borders and not their
number. What the formula does not hold for are masters that all lie on the grid: those of a run that
has just begun from a BF16 checkpoint (density_simulated.py measures them).

A block's fresh scale changes where its amax, of N elements one, crosses 448 * 2^k: of all blocks
about E|u| / (amax ln 2) in a step, each rewriting its 16384 codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fp8rl.quant import quantize_blockwise


class Expected(NamedTuple):
    """Sums over the elements of a tensor: changes to expect, and the size of the update.

    codes: None where the tensor is not quantized.
    """

    elements: float
    codes: float | None
    update: float  # sum of |u|


def expected_changes(before: Tensor, after: Tensor, *, quantized: bool) -> Expected:
    """Expect the changes between two versions of fp32 masters [N, K] (or any shape, in BF16)."""
    update = (after - before).abs()
    return Expected(
        elements=_total((update / bf16_spacing(before)).clamp(max=1.0)),
        codes=_total((update / fp8_spacing(before)).clamp(max=1.0)) if quantized else None,
        update=_total(update),
    )


def bf16_spacing(x: Tensor) -> Tensor:
    """Return the distance of neighbouring BF16 numbers at each element of an fp32 tensor."""
    return torch.ldexp(torch.ones_like(x), (_exponent(x) - 7).clamp(min=-126))


def fp8_spacing(x: Tensor) -> Tensor:
    """Return the distance of neighbouring E4M3 codes times scale at each element of [N, K]."""
    q = quantize_blockwise(x, fp32_as="export")
    n, k = x.shape
    scale = q.scale_inv.repeat_interleave(128, dim=0)[:n].repeat_interleave(128, dim=1)[:, :k]
    return torch.ldexp(scale, _exponent(x / scale).clamp(min=-6) - 3)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), int32; for zero that of the smallest normal number."""
    return torch.where(x == 0, -126, torch.frexp(x).exponent - 1)


def _total(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))
