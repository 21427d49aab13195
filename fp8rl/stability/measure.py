"""The numbers of one run of a study, from its folder.

    reward          mean of the last K held-out evaluations of the trainer's policy, exact: the mean
                    probability of the right answers (``reward/heldout_trainer``)
    engine_reward   the same of ``reward/heldout``: what the rollout engine answered, sampled
    area            mean of all evaluations by the trapezoid rule: learning faster counts
    k3, exp_abs     mismatch: median over steps (single steps have outliers)
    ess             smallest effective sample size of the untruncated weights

A run whose numbers broke has no policy to evaluate from there on: its missing evaluations, and
those that are no number, count as 0. A run that has not ended otherwise has no numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from fp8rl.errors import RunDirError
from fp8rl.run_dir import Metrics
from fp8rl.stability.collapse import Collapse, collapse
from fp8rl.stability.plan import DONE, StudyRun

REWARD, ENGINE_REWARD = "reward/heldout_trainer", "reward/heldout"
K3, EXP_ABS = "rollout_corr/k3_kl", "rollout_corr/token_mult_prob_error"
ESS = "rollout_corr/rollout_is_raw_eff_sample_size"
TRUNCATED = "rollout_corr/rollout_is_ratio_fraction_high"
REJECTED = "rollout_corr/rollout_rs_masked_fraction"
CLIPPED, GRADIENT, ENTROPY = "policy/clip_fraction_high", "grad_norm", "policy/entropy"
SATURATION, CACHE = "kv/saturation_max", "rollout/kv_cache_tokens"


@dataclass(frozen=True)
class Measured:
    """A run that has ended or broken; None where the run has no such metric."""

    arm: str
    seed: int
    steps: int
    reward: float
    engine_reward: float
    area: float
    k3: float | None
    exp_abs: float | None
    ess: float | None
    truncated: float | None
    rejected: float | None
    clipped: float | None
    gradient: float | None
    entropy: float | None
    saturation: float | None
    cache_tokens: float | None
    broke: str | None
    collapse: Collapse | None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; a cause's value that is not finite is its name."""
        found = asdict(self)
        if self.collapse is not None:
            found["collapse"]["why"] = self.collapse.why
            for cause in found["collapse"]["causes"]:
                if not math.isfinite(cause["value"]):
                    cause["value"] = str(cause["value"])
        return found


def measure(run: StudyRun, last: int) -> Measured | None:
    """Take the numbers of ``run``, its reward over the ``last`` evaluations; None before its end.

    Raises:
        RunDirError: its metrics are broken.
    """
    if run.state not in DONE:
        return None
    failure = run.failure() if run.state == "failed" else None
    lines = run.folder.metrics()
    ours, engines = (evaluations(run, lines, key) for key in (REWARD, ENGINE_REWARD))

    def taken(key: str, how: Any) -> float | None:
        found = [float(line[key]) for line in lines if key in line]
        values = [value for value in found if math.isfinite(value)]
        return float(how(values)) if values else None

    return Measured(
        arm=run.arm,
        seed=run.seed,
        steps=int(lines[-1]["step"]) if lines else 0,
        reward=fmean(value for _, value in ours[-last:]),
        engine_reward=fmean(value for _, value in engines[-last:]),
        area=_area(ours),
        k3=taken(K3, median),
        exp_abs=taken(EXP_ABS, median),
        ess=taken(ESS, min),
        truncated=taken(TRUNCATED, fmean),
        rejected=taken(REJECTED, fmean),
        clipped=taken(CLIPPED, fmean),
        gradient=taken(GRADIENT, max),
        entropy=taken(ENTROPY, lambda values: values[-1]),
        saturation=taken(SATURATION, max),
        cache_tokens=taken(CACHE, max),
        broke=None if failure is None else f"{failure.error} at step {failure.step}",
        collapse=collapse(
            lines,
            reward=REWARD,
            prompts=run.config.task.heldout_prompts,
            broke_at=None if failure is None else failure.step,
        ),
    )


def evaluations(run: StudyRun, lines: list[Metrics], key: str) -> list[tuple[int, float]]:
    """Step and reward of every evaluation planned; 0 where the run's numbers had broken.

    Raises:
        RunDirError: the run has ended, and some are missing.
    """
    found = {int(line["step"]): float(line[key]) for line in lines if key in line}
    every, steps = run.config.eval_every, run.config.steps
    planned = sorted({*range(0, steps + 1, every), steps})
    missing = [step for step in planned if step not in found]
    if missing and run.state == "ended":
        raise RunDirError(
            f"{run.config.run_dir}: the run has ended, but its metrics have no {key} at steps "
            f"{missing}; delete the folder, and it is run again"
        )
    values = ((step, found.get(step, 0.0)) for step in planned)
    return [(step, value if math.isfinite(value) else 0.0) for step, value in values]


def _area(evaluated: list[tuple[int, float]]) -> float:
    """The mean height of the curve through the evaluations."""
    pairs = list(pairwise(evaluated))
    if not pairs:
        return evaluated[0][1]
    area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairs)
    return area / (evaluated[-1][0] - evaluated[0][0])
