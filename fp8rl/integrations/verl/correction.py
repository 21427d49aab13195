"""veRL's `algorithm.rollout_correction.*` served by fp8rl's correction.

    rollout_is=token, rollout_is_threshold=2.0             TIS(level="token", cap=2.0)
    rollout_is=sequence, rollout_is_threshold="0.5_5.0"    IcePop(level="sequence", 0.5, 5.0)
    rollout_rs="seq_mean_k1,token_k3", "0.999_1.001,2"     Reject(...), Reject(...)
    rollout_is_batch_normalize=true                        BatchNormalize(level=rollout_is)

Weights and kept tokens equal veRL's 0.9.1 but for this:

* bounds of k1 are bounds on r = p_train / p_rollout; veRL's are on 1 / r. "0.5_2.0" is the same;
* NaN at a masked position changes nothing; veRL's NaN x 0 makes the weight NaN;
* the effective sample size is at most 1, and k3 finite: log-ratios are clamped before `exp`;
* weights, and the mean that `rollout_is_batch_normalize` divides by, are those of kept tokens:
  rejected ones have weight 0, and statistics of weights (`rollout_is_*`) leave them out;
* an unmasked log-prob that is NaN, infinite or positive is an error;
* a plain threshold of a ratio that is below 1 is an error: Hydra reads 0.5_5 as the number 0.55.

Metrics of veRL's names equal veRL's, but these, which are of the weights as the loss takes them:

    rollout_is_mean, _std, _max, _min      after normalization; veRL's are before it. At sequence
                                           level veRL's max and min are of raw ratios
    rollout_is_ratio_fraction_high, _low   of tokens; at sequence level veRL's are of sequences

And these of veRL's are missing: rollout_is_seq_*, rollout_is_oob_ratio,
rollout_is_batch_norm_factor, and of each criterion its own distribution
(rollout_rs_<name>_{mean,std,max,min,fraction_*,seq_*}; its masked fractions are there).

What rejection leaves of a batch is also what the loss divides by: `denominators.py`.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from fp8rl.correction import TIS, BatchNormalize, IcePop, Reject, Stage, correct
from fp8rl.correction.stages import LARGEST_BOUND, SMALLEST_BOUND
from fp8rl.integrations.verl.places import missing

logger = logging.getLogger(__name__)

PLACE: Final = "compute_rollout_correction_and_rejection_mask"
LEVELS: Final = ("token", "sequence")
CRITERIA: Final = tuple(
    f"{level}_{divergence}"
    for level in ("token", "seq_sum", "seq_mean", "seq_max")
    for divergence in ("k1", "k2", "k3")
    if (level, divergence) != ("seq_max", "k1")
)
_said: set[str] = set()


def stages_of(
    rollout_is: str | None = None,
    rollout_is_threshold: str | float | None = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: str | float | None = None,
) -> tuple[Stage, ...]:
    """The stages that veRL's settings stand for, in the order weights, rejection, normalization.

    Args are veRL's keys of the same names; thresholds as veRL writes them: 2.0, "2.0", "0.5_2.0",
    and for several criteria one for all, or one each, with commas between.

    Raises:
        ValueError: names the key, what it holds and what it takes.
    """
    stages: list[Stage] = []
    weighted = rollout_is is not None and rollout_is_threshold is not None
    if weighted:
        if rollout_is not in LEVELS:
            raise ValueError(f"rollout_is={rollout_is!r} is not one of {', '.join(LEVELS)}")
        level: Any = rollout_is
        low, high = _bounds("rollout_is_threshold", rollout_is_threshold)
        if low is None:
            stages.append(TIS(level=level, cap=high))
        else:
            stages.append(IcePop(level=level, low=low, high=high))
    if rollout_rs is not None:
        stages += _rejections(rollout_rs, rollout_rs_threshold)
    if rollout_is_batch_normalize and weighted:
        stages.append(BatchNormalize(level=level))
    return tuple(stages)


def rollout_correction(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    response_mask: Tensor,
    rollout_is: str | None = None,
    rollout_is_threshold: str | float | None = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: str | float | None = None,
) -> tuple[Any, Tensor, dict[str, float]]:
    """What veRL's `compute_rollout_correction_and_rejection_mask` returns, by our correction.

    Args:
        old_log_prob, rollout_log_prob: [batch, tokens], nats. response_mask: the same shape, 1 for
            sampled tokens. The others: `stages_of`.

    Returns:
        a DataProto with `rollout_is_weights` (fp32 [batch, tokens]), or None without `rollout_is`;
        the response mask in its dtype without what was rejected; metrics.

    Raises:
        ValueError: as `stages_of` and `fp8rl.correction.correct`.
    """
    from verl.protocol import DataProto

    if "served" not in _said:
        _said.add("served")
        logger.warning("algorithm.rollout_correction is served by fp8rl in this process")
    stages = stages_of(
        rollout_is,
        rollout_is_threshold,
        rollout_is_batch_normalize,
        rollout_rs,
        rollout_rs_threshold,
    )
    result = correct(stages, old_log_prob, rollout_log_prob, response_mask.bool())
    weights = None
    if any(isinstance(stage, TIS | IcePop) for stage in stages):
        weights = DataProto.from_dict(tensors={"rollout_is_weights": result.weights})
    return weights, result.kept.to(response_mask.dtype), result.metrics()


def install(helper: ModuleType) -> None:
    """Put `rollout_correction` in the place of veRL's function, through which all callers go."""
    if not hasattr(helper, PLACE):
        missing(f"{helper.__name__}.{PLACE}")
        return
    setattr(helper, PLACE, rollout_correction)


def _rejections(criteria: str, threshold: str | float | None) -> list[Stage]:
    names = list(dict.fromkeys(name.strip() for name in criteria.split(",") if name.strip()))
    if not names:
        raise ValueError(f"rollout_rs={criteria!r} names no criterion; leave it null for none")
    for name in names:
        if name not in CRITERIA:
            raise ValueError(f"rollout_rs: {name!r} is not one of {', '.join(CRITERIA)}")
    if threshold is None:
        raise ValueError(f"rollout_rs={criteria!r} needs rollout_rs_threshold")
    texts = [text.strip() for text in str(threshold).split(",") if text.strip()]
    if len(texts) == 1:
        texts *= len(names)
    if len(texts) != len(names):
        raise ValueError(
            f"rollout_rs_threshold={threshold!r} has {len(texts)} thresholds for {len(names)} "
            f"criteria ({criteria}); give one for all, or one each"
        )
    return [_rejection(name, text) for name, text in zip(names, texts, strict=True)]


def _rejection(name: str, threshold: str) -> Stage:
    given, _, found = name.rpartition("_")
    level: Any = given
    divergence: Any = found
    low, high = _bounds(f"rollout_rs_threshold of {name}", threshold, of_ratio=divergence == "k1")
    if divergence == "k1":
        return Reject(divergence="k1", level=level, low=1 / high if low is None else low, high=high)
    if low is not None:
        raise ValueError(
            f"rollout_rs_threshold of {name}: {threshold!r}; it has an upper bound only"
        )
    return Reject(divergence=divergence, level=level, high=high)


def _bounds(
    key: str, threshold: str | float | None, *, of_ratio: bool = True
) -> tuple[float | None, float]:
    """Lower and upper bound from 2.0, "2.0" or "0.5_2.0"; positive, and in that order."""
    texts = str(threshold).strip().split("_")
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    usable = all(SMALLEST_BOUND <= number <= LARGEST_BOUND for number in numbers)
    if not 1 <= len(numbers) <= 2 or isinstance(threshold, bool) or not usable:
        raise ValueError(
            f"{key}: {threshold!r}; expected a positive number, or lower_upper, from "
            f"{SMALLEST_BOUND:g} to {LARGEST_BOUND:g}"
        )
    if len(numbers) == 1:
        if of_ratio and numbers[0] < 1:
            raise ValueError(
                f"{key}: {threshold!r} is an upper bound below 1, the ratio of equal policies; if "
                "two bounds were meant, write both with a point, as 0.5_5.0: Hydra reads 0.5_5 as "
                "the number 0.55"
            )
        return None, numbers[0]
    low, high = numbers
    if low >= high:
        raise ValueError(f"{key}: {threshold!r}; the first is the lower bound, and must be below")
    return low, high
