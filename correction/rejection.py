"""Which tokens a rejecting stage keeps: k1, k2, k3 at token or sequence level, and the veto.

With `lr = log p_train - log p_rollout`: `k1 = -lr`, `k2 = lr^2 / 2`, `k3 = exp(lr) - 1 - lr`
(joschu.net/blog/kl-approx.html). Bounds on k1 are given, and applied, as bounds on the ratio: a
sequence is judged by `exp(sum lr)` or `exp(mean lr)`. Criteria are written so that a NaN is kept,
and shows, instead of vanishing with the rejected.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from fp8rl.correction.layout import Layout
from fp8rl.correction.ratios import mean_of_tokens
from fp8rl.correction.stages import Reject, Rejection, Veto


@dataclass(frozen=True, eq=False)
class TokenLogRatios:
    """A part's log-ratios and what stages need again and again.

    Attributes:
        value: like mask, fp32 or wider, clamped to +-20, 0 where masked.
        k3: like mask, 0 where masked.
        sums: fp64 [batch], over sequences, of unclamped ones.
        tokens: fp64 [batch], unmasked tokens of each sequence.
    """

    value: Tensor
    k3: Tensor
    sums: Tensor
    tokens: Tensor


def kept_by(stage: Rejection, lr: TokenLogRatios, mask: Tensor, layout: Layout) -> Tensor:
    """Bool like mask (masked positions: anything): what `stage` alone keeps."""
    if isinstance(stage, Veto):
        slips = mask & (lr.value < log(stage.floor))
        return layout.spread(layout.count(slips) == 0)
    if stage.level == "token":
        return ~_outside(stage, _divergence(stage, lr))
    if stage.level == "seq_max":
        outside = mask & _outside(stage, _divergence(stage, lr))
        return layout.spread(layout.count(outside) == 0)
    row = lr.sums if stage.divergence == "k1" else layout.sum(_divergence(stage, lr).double())
    if stage.level == "seq_mean":
        row = mean_of_tokens(row, lr.tokens)
    return layout.spread(~_outside(stage, row))


def _divergence(stage: Reject, lr: TokenLogRatios) -> Tensor:
    """The token's divergence; for k1 the log-ratio, whose bounds are the ratio's."""
    match stage.divergence:
        case "k1":
            return lr.value
        case "k2":
            return lr.value.square() / 2
        case _:
            return lr.k3


def _outside(stage: Reject, value: Tensor) -> Tensor:
    if stage.divergence != "k1":
        return value > stage.high
    assert stage.low is not None  # Reject has checked
    low = log(stage.low) if stage.low > 0 else -torch.inf
    return (value < low) | (value > log(stage.high))
