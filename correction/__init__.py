"""Statistics: correct the loss where the policy that sampled is not the policy that learns.

    correction = correct(TIS(cap=2.0), train_logprobs, rollout_logprobs, mask)
    out = policy_loss(PolicyLossConfig(), logprobs, train_logprobs, advantages,
                      correction.weights, correction.kept)
    out.loss.backward()

Works on any two tensors of log-probs; knows nothing of FP8, engines or trainers.
"""

from fp8rl.correction.advantages import group_advantages
from fp8rl.correction.config import (
    MIS,
    TIS,
    CorrectionConfig,
    Level,
    NoCorrection,
    PolicyLossConfig,
)
from fp8rl.correction.errors import (
    CorrectionError,
    LogProbError,
    MaskError,
    ShapeError,
    ValueRangeError,
)
from fp8rl.correction.losses import LossOutput, policy_loss
from fp8rl.correction.metrics import (
    MismatchSums,
    correction_metrics,
    mismatch_metrics,
    mismatch_sums,
)
from fp8rl.correction.weights import Correction, correct

__all__ = [
    "MIS",
    "TIS",
    "Correction",
    "CorrectionConfig",
    "CorrectionError",
    "Level",
    "LogProbError",
    "LossOutput",
    "MaskError",
    "MismatchSums",
    "NoCorrection",
    "PolicyLossConfig",
    "ShapeError",
    "ValueRangeError",
    "correct",
    "correction_metrics",
    "group_advantages",
    "mismatch_metrics",
    "mismatch_sums",
    "policy_loss",
]
