"""Importance weights that correct a loss for the mismatch of rollout and training policies.

    tis: w = min(r, cap)     mis: w = r if low <= r <= high, else dropped
    icepop: w = r if low <= r <= high, else 0        no weighting stage: w = 1

with the ratios of `ratios.py` and the stages of `stages.py`. A dropped token leaves `kept`, and so
the loss's denominator. A ratio that overflows saturates at the cap. Everything is done in one pass
over parts of whole sequences that fit the caches, in which the metrics are counted too; only the
rescaling stages, which need the batch's mean first, touch the weights a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from fp8rl.correction.checks import check_shapes, raise_first, waits
from fp8rl.correction.counting import Counted, PartStatistics, batch_statistics
from fp8rl.correction.errors import LogProbError
from fp8rl.correction.layout import Layout, layout_of
from fp8rl.correction.metrics import correction_metrics
from fp8rl.correction.ratios import (
    LOG_RATIO_LIMIT,
    bounded_exp,
    masked,
    mean_of_tokens,
    sequence_log_ratios,
)
from fp8rl.correction.rejection import TokenLogRatios, kept_by
from fp8rl.correction.rescaling import rescale
from fp8rl.correction.stages import (
    MIS,
    TIS,
    IcePop,
    Rejection,
    Rescaling,
    Stage,
    Weighting,
    check_stages,
)
from fp8rl.correction.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Correction:
    """What the loss needs, and what was counted on the way; nothing carries gradient.

    Attributes:
        weights: fp32 like mask; 0 wherever `kept` is False.
        kept: bool like mask; the tokens that count in the loss and in its denominator.
        statistics: of this rank's tokens; those of micro-batches add up.
        stages: what it was made with.
    """

    weights: Float32[Tensor, "*tokens"]
    kept: Bool[Tensor, "*tokens"]
    statistics: Statistics
    stages: tuple[Stage, ...]

    def metrics(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The `rollout_corr/...` metrics (`metrics.py`); of all ranks of `group`, exactly.

        Raises:
            MaskError: the mask selects no token.
            LogProbError: on CUDA, or compiled, a log-prob was NaN, infinite or positive; on a CPU
                `correct` has said so already.
        """
        return correction_metrics(self.stages, self.statistics.reduced(group))


@torch.no_grad()
def correct(
    stages: Sequence[Stage],
    train_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Correction:
    """Weigh every unmasked token by what the learning policy thinks of it against the sampler.

    Args:
        stages: what to do, in order; none leaves every weight 1 and measures.
        train_logprobs: the trainer's log-probs of the sampled tokens, [batch, tokens] or packed
            [tokens], nats. Decoupled: of the policy as it was when the batch came (pi_old); bypass:
            of the policy being stepped.
        rollout_logprobs: the engine's, with which it sampled; like `train_logprobs`.
        mask: bool like `train_logprobs`, True for sampled tokens; may be False everywhere.
        cu_seqlens: int [batch + 1] of a packed batch, from 0 to tokens.
        group: process group over whose ranks rescaling stages take their means; without one they
            are this call's, so give whole batches, not micro-batches.

    Raises:
        MaskError, ShapeError: the tensors do not fit together.
        LogProbError: an unmasked log-prob is NaN, infinite or positive. On CUDA, where that cannot
            be known without waiting, the weights are NaN instead and `metrics` raises.
        ValueError: two stages that give weights, or a rescaling before one (`check_stages`).
    """
    check_stages(stages)
    layout = layout_of(mask, cu_seqlens)
    logprobs = {"train_logprobs": train_logprobs, "rollout_logprobs": rollout_logprobs}
    check_shapes(mask, logprobs)
    weights = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    kept = torch.empty_like(mask)
    counted: Counted | None = None
    for where, part in layout.parts():
        out = weights[where], kept[where]
        tensors = train_logprobs[where], rollout_logprobs[where], mask[where]
        found = _correct_part(stages, part, *tensors, *out)
        counted = found if counted is None else counted + found
    assert counted is not None  # a mask has positions
    statistics = batch_statistics(counted, mask.numel())
    rescaling = [stage for stage in stages if isinstance(stage, Rescaling)]
    if not waits(mask.device):
        # before ranks take a mean together they know whether one of them is about to refuse
        known = statistics.reduced(group) if rescaling else statistics
        if known.sum("unusable_train") + known.sum("unusable_rollout") > 0:
            raise_first(mask, logprobs, {})
            raise LogProbError("train_logprobs, rollout_logprobs: another rank's cannot be used")
    for stage in rescaling:
        statistics = rescale(stage, weights, kept, statistics, group)
    return Correction(weights, kept, statistics, tuple(stages))


def _correct_part(
    stages: Sequence[Stage],
    layout: Layout,
    train_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    weights: Tensor,
    kept: Tensor,
) -> Counted:
    """Fill `weights` and `kept` of a few sequences and count them."""
    counting = PartStatistics(layout, mask)
    train, rollout = masked(train_logprobs, mask), masked(rollout_logprobs, mask)
    lr = train - rollout
    sums, tokens = sequence_log_ratios(lr, layout), layout.count(mask)
    lr.clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = lr.exp()
    token_lr = TokenLogRatios(lr, lr.expm1() - lr, sums, tokens)
    counting.policies(train, rollout, token_lr)
    counting.tokens(token_lr, ratio)

    keep = mask
    for stage in stages:
        if isinstance(stage, Rejection):
            keeps = kept_by(stage, token_lr, mask, layout)
            counting.rejected(stage.name, keeps)
            keep = keep & keeps
    weighting = next((stage for stage in stages if isinstance(stage, Weighting)), None)
    level_ratio = _level_ratio(weighting, ratio, token_lr, layout)
    counting.level_ratios(weighting, level_ratio)
    weight, keep = _weigh(weighting, level_ratio, keep)
    if waits(mask.device):
        weight = weight + counting.poison()
    weights.copy_(masked(weight, keep))
    kept.copy_(keep)
    counting.weights(weights, kept)
    return counting.result()


def _level_ratio(
    weighting: Weighting | None, ratio: Tensor, lr: TokenLogRatios, layout: Layout
) -> Tensor:
    """The ratios that the weighting stage looks at, like mask; masked positions: anything."""
    if weighting is None or weighting.level == "token":
        return ratio
    row = lr.sums
    if weighting.level == "geometric":
        row = mean_of_tokens(row, lr.tokens)
    return layout.spread(bounded_exp(row).to(ratio.dtype))


def _weigh(weighting: Weighting | None, ratio: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Weights like mask, and which of `keep` stays; a NaN is kept, so that it shows."""
    match weighting:
        case TIS():
            return ratio.clamp(max=weighting.cap), keep
        case MIS():
            return ratio, keep & ~((ratio < weighting.low) | (ratio > weighting.high))
        case IcePop():
            outside = (ratio < weighting.low) | (ratio > weighting.high)
            return ratio.masked_fill(outside, 0.0), keep
        case _:
            return torch.ones_like(ratio), keep
