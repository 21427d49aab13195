"""What a run does about drift by itself, from the probe that finds it to the next that does not.

    recalibrate   where the KV cache loses too much: its scales are measured anew with each
                  version, whatever ``kv_scales.recalibrate`` says, on 4 times the tokens
    tighten       after any warning: every bound on the importance ratio comes nearer to 1,

                      b -> sqrt(b)        a cap of 2 becomes 1.41, a band [0.5, 2] [0.71, 1.41]

                  so that no token weighs more than the square root of what was thought right

Left out: going on with a BF16 cache or BF16 weights, for which the engine has to be started anew.
"""

from __future__ import annotations

import math

from fp8rl.correction import CorrectionConfig
from fp8rl.correction.stages import MIS, TIS, IcePop, Reject, Stage


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
