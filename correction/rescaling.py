"""Stages that change the weights of a whole batch by one affine map: `w' = a w + b`.

    batch_normalize   a = 1 / mean w                     b = 0
    ess_mixing        a = lambda                         b = 1 - lambda

with, for a target effective sample size tau, `c = sqrt((1 - tau) / tau)` and mean `1 + m` and
variance v of the weights, `lambda = c / (sqrt(v) - c m)`, in [0, 1]: the coefficient of variation
of `1 + lambda (w - 1)` is `lambda sqrt(v) / (1 + lambda m)`, which grows with lambda, and the
effective sample size is `1 / (1 + cv^2)`. Means are over kept tokens. Nothing waits for a device.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.correction.stages import BatchNormalize, ESSMixing, Rescaling
from fp8rl.correction.statistics import Statistics


def rescale(
    stage: Rescaling,
    weights: Tensor,
    kept: Tensor,
    statistics: Statistics,
    group: dist.ProcessGroup | None,
) -> Statistics:
    """Change `weights` in place; returns the statistics of the new ones."""
    whole = statistics.reduced(group)
    a, b = _normalize(stage, whole) if isinstance(stage, BatchNormalize) else _mix(stage, whole)
    weights.mul_(a.to(weights.dtype))
    if isinstance(stage, ESSMixing):
        weights.add_(b.to(weights.dtype)).masked_fill_(~kept, 0.0)
    return _rescaled(statistics, a, b)


def _normalize(stage: BatchNormalize, whole: Statistics) -> tuple[Tensor, Tensor]:
    n = whole.sum("kept")
    mean = whole.sum("weight") / n.clamp(min=1)
    if stage.level == "sequence":
        mean = whole.sum("kept_sequence_weight") / whole.sum("kept_sequences").clamp(min=1)
    usable = (n > 0) & (mean != 0)  # all weights 0, as icepop may leave them, stay 0; NaN stays NaN
    return torch.where(usable, 1 / torch.where(usable, mean, 1.0), 1.0), torch.zeros_like(mean)


def _mix(stage: ESSMixing, whole: Statistics) -> tuple[Tensor, Tensor]:
    n = whole.sum("kept").clamp(min=1)
    mean = whole.sum("weight") / n
    variance = (whole.sum("weight_squared") / n - mean.square()).clamp(min=0)
    c = ((1 - stage.target) / stage.target) ** 0.5
    slack = variance.sqrt() - c * (mean - 1)
    reached = slack <= c  # lambda = 1 is enough
    mixing = torch.where(reached, 1.0, c / torch.where(reached, 1.0, slack))
    return mixing, 1 - mixing


def _rescaled(old: Statistics, a: Tensor, b: Tensor) -> Statistics:
    """The statistics of `a w + b` from those of `w`, a >= 0."""
    n, first, second = (old.sum(name) for name in ("kept", "weight", "weight_squared"))
    sums = {
        "weight": a * first + b * n,
        "weight_squared": a**2 * second + 2 * a * b * first + b**2 * n,
        "kept_sequence_weight": a * old.sum("kept_sequence_weight") + b * old.sum("kept_sequences"),
    }
    highest, lowest = old.maximum("weight"), -old.maximum("negative_weight")
    maxima = {"weight": a * highest + b, "negative_weight": -(a * lowest + b)}
    return old.replaced(sums, maxima)
