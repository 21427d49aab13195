"""Statistics: correct the loss where the policy that sampled is not the policy that learns.

    correction = correct([TIS(cap=2.0)], train_logprobs, rollout_logprobs, mask)
    out = policy_loss(PPOClip(), logprobs, train_logprobs, advantages,
                      correction.weights, correction.kept)
    out.loss.backward()
    print(correction.metrics())

Works on any two tensors of log-probs; knows nothing of FP8, engines or trainers.
"""

from fp8rl.correction.advantages import group_advantages
from fp8rl.correction.aggregation import Counts, count
from fp8rl.correction.config import PRESETS, CorrectionConfig, Mode, check_bypass
from fp8rl.correction.errors import (
    CorrectionError,
    LogProbError,
    MaskError,
    ShapeError,
    ValueRangeError,
)
from fp8rl.correction.groups import Groups, by_age, by_position, group_metrics
from fp8rl.correction.logprobs import TokenScores, log_probs_from_hidden, log_probs_from_logits
from fp8rl.correction.losses import LossOutput, policy_loss
from fp8rl.correction.losses_config import (
    CISPO,
    GSPO,
    LOSS_PRESETS,
    Aggregation,
    LossConfig,
    MasteredTokens,
    PPOClip,
    Reinforce,
)
from fp8rl.correction.mastered import drop_mastered
from fp8rl.correction.metrics import correction_metrics
from fp8rl.correction.ratios import importance_ratios
from fp8rl.correction.stages import (
    MIS,
    TIS,
    BatchNormalize,
    ESSMixing,
    IcePop,
    Level,
    Reject,
    Stage,
    Veto,
)
from fp8rl.correction.statistics import Statistics, total
from fp8rl.correction.weights import Correction, correct

__all__ = [
    "CISPO",
    "GSPO",
    "LOSS_PRESETS",
    "MIS",
    "PRESETS",
    "TIS",
    "Aggregation",
    "BatchNormalize",
    "Correction",
    "CorrectionConfig",
    "CorrectionError",
    "Counts",
    "ESSMixing",
    "Groups",
    "IcePop",
    "Level",
    "LogProbError",
    "LossConfig",
    "LossOutput",
    "MaskError",
    "MasteredTokens",
    "Mode",
    "PPOClip",
    "Reinforce",
    "Reject",
    "ShapeError",
    "Stage",
    "Statistics",
    "TokenScores",
    "ValueRangeError",
    "Veto",
    "by_age",
    "by_position",
    "check_bypass",
    "correct",
    "correction_metrics",
    "count",
    "drop_mastered",
    "group_advantages",
    "group_metrics",
    "importance_ratios",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "policy_loss",
    "total",
]
