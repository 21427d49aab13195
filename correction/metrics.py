"""How far rollout and training policies are apart, and what the correction did about it.

With `lr = log p_train - log p_rollout` and `r = exp(lr)`, over unmasked tokens sampled by the
rollout policy, always from the raw ratios, before anything is truncated:

    k1 = mean(-lr)    k3 = mean(r - 1 - lr)    both estimate KL(rollout || train); k3 is >= 0
    exp_abs_diff = mean(exp(|lr|))             NeMo-RL's "token multiplicative probability error"
    ess = (sum r)^2 / (n * sum r^2)            effective sample size as a fraction, in (0, 1]
    ppl = exp(-mean(log p))                    over tokens, for each policy

k1 and k3 are Schulman's estimators (joschu.net/blog/kl-approx.html). Exponents are clamped to +-20:
every number is finite. Leaves out: reduction over ranks, buckets by position or age.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.correction.checks import check_shapes, check_values
from fp8rl.correction.config import TIS, CorrectionConfig
from fp8rl.correction.errors import MaskError
from fp8rl.correction.ratios import LOG_RATIO_LIMIT, bounded_exp, log_ratios, masked
from fp8rl.correction.weights import Correction


@dataclass(frozen=True)
class MismatchSums:
    """Sums over tokens from which the metrics follow; `a + b` is that of both batches together."""

    tokens: float
    log_ratio: float
    k3: float
    exp_abs_diff: float
    ratio: float
    ratio_squared: float
    train_logprob: float
    rollout_logprob: float
    max_abs_diff: float
    ratio_min: float
    ratio_max: float

    def __add__(self, other: "MismatchSums") -> "MismatchSums":
        """Both batches' sums, and the extremes of either."""
        return MismatchSums(
            tokens=self.tokens + other.tokens,
            log_ratio=self.log_ratio + other.log_ratio,
            k3=self.k3 + other.k3,
            exp_abs_diff=self.exp_abs_diff + other.exp_abs_diff,
            ratio=self.ratio + other.ratio,
            ratio_squared=self.ratio_squared + other.ratio_squared,
            train_logprob=self.train_logprob + other.train_logprob,
            rollout_logprob=self.rollout_logprob + other.rollout_logprob,
            max_abs_diff=max(self.max_abs_diff, other.max_abs_diff),
            ratio_min=min(self.ratio_min, other.ratio_min),
            ratio_max=max(self.ratio_max, other.ratio_max),
        )

    def metrics(self) -> dict[str, float]:
        """The `mismatch/...` metrics of these tokens.

        Raises:
            MaskError: there were none.
        """
        n = self.tokens
        if n == 0:
            raise MaskError("mask: selects no token, so there is no mismatch to measure")
        mean, mean_square = self.ratio / n, self.ratio_squared / n
        return {
            "mismatch/k1": -self.log_ratio / n,
            "mismatch/k3": self.k3 / n,
            "mismatch/exp_abs_diff": self.exp_abs_diff / n,
            "mismatch/max_abs_diff": self.max_abs_diff,
            # at most 1 by Cauchy-Schwarz; min() takes the last rounding
            "mismatch/ess": min(1.0, mean**2 / mean_square),
            "mismatch/ratio_mean": mean,
            "mismatch/ratio_std": math.sqrt(max(0.0, mean_square - mean**2)),
            "mismatch/ratio_min": self.ratio_min,
            "mismatch/ratio_max": self.ratio_max,
            "mismatch/rollout_ppl": math.exp(min(-self.rollout_logprob / n, LOG_RATIO_LIMIT)),
            "mismatch/train_ppl": math.exp(min(-self.train_logprob / n, LOG_RATIO_LIMIT)),
        }


@torch.no_grad()
def mismatch_sums(
    train_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
) -> MismatchSums:
    """The sums of one micro-batch; may have no unmasked token. Arguments and errors: `correct`."""
    logprobs = {"train_logprobs": train_logprobs, "rollout_logprobs": rollout_logprobs}
    check_shapes(mask, logprobs)
    check_values(mask, logprobs=logprobs)
    # fp64: k3 is a small difference of numbers near 1
    train, rollout = masked(train_logprobs.double(), mask), masked(rollout_logprobs.double(), mask)
    lr = log_ratios(train, rollout, mask)
    ratio, absolute = masked(bounded_exp(lr), mask), lr.abs()
    capped = lr.clamp(max=LOG_RATIO_LIMIT)
    values = [
        mask.sum().double(),
        lr.sum(),
        (torch.expm1(capped) - capped).sum(),
        masked(bounded_exp(absolute), mask).sum(),
        ratio.sum(),
        ratio.square().sum(),
        train.sum(),
        rollout.sum(),
        absolute.amax(),
        torch.where(mask, ratio, torch.inf).amin(),
        ratio.amax(),
    ]
    return MismatchSums(*torch.stack(values).tolist())


def mismatch_metrics(
    train_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
) -> dict[str, float]:
    """The `mismatch/...` metrics of one batch; for micro-batches add up `mismatch_sums` instead.

    Raises:
        MaskError: the mask is not usable or selects no token.
        ShapeError, LogProbError: as for `correct`.
    """
    return mismatch_sums(train_logprobs, rollout_logprobs, mask).metrics()


@torch.no_grad()
def correction_metrics(
    config: CorrectionConfig, correction: Correction, mask: Bool[Tensor, "batch tokens"]
) -> dict[str, float]:
    """The `correction/...` metrics: means over unmasked tokens, a rejected one weighing 0.

    Micro-batches combine as means weighted by `mask.sum()`.

    Args:
        config: what `correction` was made with.
        correction: from `correct`.
        mask: the mask that `correct` was given, bool [batch, tokens].

    Raises:
        MaskError: the mask is not usable or selects no token.
        ShapeError: the mask is not of the correction's shape.
    """
    check_shapes(mask, {"correction.weights": correction.weights})
    truncated = correction.weights < correction.ratios if isinstance(config, TIS) else ~mask
    values = [
        mask.sum(),
        (truncated & mask).sum(),
        (mask & ~correction.kept).sum(),
        masked(correction.weights, mask).sum(dtype=torch.float64),
        masked(correction.ratios, mask).sum(dtype=torch.float64),
    ]
    tokens, n_truncated, n_rejected, weight, raw = torch.stack(
        [v.double() for v in values]
    ).tolist()
    if tokens == 0:
        raise MaskError("mask: selects no token, so there is no correction to measure")
    return {
        "correction/truncated_fraction": n_truncated / tokens,
        "correction/rejected_fraction": n_rejected / tokens,
        "correction/weight_mean": weight / tokens,
        "correction/raw_weight_mean": raw / tokens,
    }
