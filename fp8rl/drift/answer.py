"""What a run does about drift by itself.

From the probe that finds it to the next that does not:

    recalibrate   where the KV cache loses too much: its scales are measured anew with each
                  version, whatever ``kv_scales.recalibrate`` says, on 4 times the tokens
    tighten       after any warning: every bound on the importance ratio comes nearer to 1,

                      b -> sqrt(b)        a cap of 2 becomes 1.41, a band [0.5, 2] [0.71, 1.41]

                  so that no token weighs more than the square root of what was thought right

From the step after the probe that finds it to the end of the run:

    fall-back     what the probe blames is BF16 in a new engine

                      blamed                            fp8-kv becomes   fp8    kv-only
                      cache                             fp8              -      bf16
                      any other threshold of a layer,
                      the embedding or the head         kv-only          bf16   bf16
                      both, or log-probs alone          bf16             bf16   bf16

Only ``cache`` measures the cache alone, so all else is held against the weights first; with them go
activations and routers. Where they are BF16 already, the cache is the last that is FP8, and goes: a
kernel that writes it wrongly shows as ``unexplained`` too. What still drifts in a BF16 engine does
not drift because of FP8. Left out: going back to FP8, of which no probe of a BF16 engine says
whether it is well again.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

from fp8rl.config.rollout import BF16_WEIGHTS, FP8_CACHE, Precision, RolloutConfig
from fp8rl.correction import CorrectionConfig
from fp8rl.correction.stages import MIS, TIS, IcePop, Reject, Stage

Part = Literal["weights", "cache"]
BOTH: frozenset[Part] = frozenset(get_args(Part))
PRECISIONS: dict[tuple[bool, bool], Precision] = {  # FP8 weights, FP8 cache
    (False, False): "bf16",
    (True, False): "fp8",
    (False, True): "kv-only",
    (True, True): "fp8-kv",
}


def fallen_back(rollout: RolloutConfig, parts: Collection[Part]) -> RolloutConfig:
    """The rollout with these parts in BF16; settings of FP8 weights go with the weights."""
    weights = rollout.precision not in BF16_WEIGHTS and "weights" not in parts
    cache = rollout.precision in FP8_CACHE and "cache" not in parts
    chosen: dict[str, Any] = {"precision": PRECISIONS[weights, cache]}
    if "weights" in parts:
        chosen |= {"scale_format": "pow2", "router": "bf16"}
        chosen |= {"activations": None} if rollout.activations == "fp8" else {}
    return RolloutConfig(**(rollout.model_dump() | chosen))


def can_fall_back(rollout: RolloutConfig) -> bool:
    """Whether anything is FP8."""
    return fallen_back(rollout, BOTH) != rollout


def blamed(rollout: RolloutConfig, kinds: Collection[str]) -> frozenset[Part]:
    """The parts that are to fall back.

    Args:
        rollout: what was probed.
        kinds: of the thresholds that the probe passed, as ``cache``; one at least.
    """
    of_layers = set(kinds) - {"logprob"}
    parts: set[Part] = {"cache" if kind == "cache" else "weights" for kind in of_layers}
    if not parts or fallen_back(rollout, parts) == rollout:
        return BOTH
    return frozenset(parts)


def tightened(correction: CorrectionConfig) -> CorrectionConfig:
    """The correction with every bound on a ratio at its square root; others stay."""
    stages = tuple(_tightened(stage) for stage in correction.stages)
    return correction.model_copy(update={"stages": stages})


def can_tighten(correction: CorrectionConfig) -> bool:
    """Whether there is a bound that would come nearer to 1."""
    return tightened(correction) != correction


def _tightened(stage: Stage) -> Stage:
    if isinstance(stage, TIS):
        return stage.model_copy(update={"cap": math.sqrt(stage.cap)})
    if isinstance(stage, MIS | IcePop):
        return stage.model_copy(update={"low": math.sqrt(stage.low), "high": math.sqrt(stage.high)})
    if isinstance(stage, Reject) and stage.low is not None:  # k1; others bound a divergence
        return stage.model_copy(update={"low": math.sqrt(stage.low), "high": math.sqrt(stage.high)})
    return stage
