"""What arms are compared by: each quantity is one number of a run, with its source.

Differences to the baseline are absolute where ``ratio`` is False, else factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from fp8rl.report.checks_mismatch import CUT, REJECTED, touched
from fp8rl.report.data import RunData
from fp8rl.report.page import Source
from fp8rl.report.words import mib, percent

UNCOUNTED = ("eval", "checkpoint")  # phases that are no part of a step's work
EXACT, SAMPLED = "reward/heldout_trainer", "reward/heldout"
LAST_EVALUATIONS = 3


@dataclass(frozen=True)
class Quantity:
    """``of`` gives the number of one run, None where it was not measured; ``show`` writes it."""

    name: str
    of: Callable[[RunData], float | None]
    show: Callable[[float], str]
    source: Source
    ratio: bool = False


def working_seconds(run: RunData) -> float | None:
    """Mean seconds of the steps that learned, without evaluations and checkpoints."""
    spent = [
        float(line["time/step"]) - sum(float(line.get(f"time/{name}", 0)) for name in UNCOUNTED)
        for line in run.metrics
        if "time/train" in line
    ]
    return sum(spent) / len(spent) if spent else None


def end_reward(run: RunData, key: str) -> float | None:
    """The mean of the last three held-out evaluations, or of as many as there are."""
    values = run.series(key).values[-LAST_EVALUATIONS:]
    return fmean(values) if values else None


def reward(runs: Sequence[RunData]) -> Quantity:
    """The held-out reward at the end: the exact one where every run has it, else the sampled."""
    exact = all(run.series(EXACT) for run in runs)
    key = EXACT if exact else SAMPLED
    what = {
        EXACT: "How probable the trainer's policy finds the right answers at the end, to prompts "
        "never trained on; exact.",
        SAMPLED: "How well the engine answers at the end, on prompts never trained on; sampled.",
    }
    return Quantity(
        "held-out reward",
        partial(end_reward, key=key),
        lambda value: f"{value:.3f}",
        Source(
            what[key],
            f"mean of the last {LAST_EVALUATIONS} evaluations; then over seeds",
            (key,),
            f"the last {LAST_EVALUATIONS} evaluations of each run",
        ),
    )


CACHE = Quantity(
    "KV cache, tokens",
    lambda run: run.series("rollout/kv_cache_tokens").last,
    lambda value: f"{value:,.0f}",
    Source(
        "Tokens of full-length requests that the engine's KV cache holds.",
        keys=("rollout/kv_cache_tokens",),
        over="the last step",
        reference="the engine's own count",
    ),
    ratio=True,
)
BYTES = Quantity(
    "bytes of a weight update",
    lambda run: run.series("sync/bytes").last,
    mib,
    Source("What the last update sent.", keys=("sync/bytes",), over="the last update"),
    ratio=True,
)
SPEED = Quantity(
    "rollout tokens/s",
    lambda run: run.series("rollout/tokens_per_second").median,
    lambda value: f"{value:,.0f}",
    Source(
        "Tokens sampled, by the time of the rollout phase.",
        "median over steps; then the mean over seeds",
        ("rollout/tokens_per_second",),
        "every step",
    ),
    ratio=True,
)
STEP = Quantity(
    "seconds a step",
    working_seconds,
    lambda value: f"{value:.2f}",
    Source(
        "Time of a step that learned, without evaluations and checkpoints.",
        "mean over steps of time/step - time/eval - time/checkpoint; then over seeds",
        ("time/step", "time/eval", "time/checkpoint"),
        "every step with time/train",
    ),
    ratio=True,
)
QUANTITIES = (  # beside the reward
    Quantity(
        "exp|dlogp|",
        lambda run: run.series("rollout_corr/token_mult_prob_error").median,
        lambda value: f"{value:.4f}",
        Source(
            "By what factor trainer and engine differ on a sampled token's probability.",
            "median over steps of the mean exp |log p_train - log p_rollout|",
            ("rollout_corr/token_mult_prob_error",),
            "every step",
        ),
    ),
    Quantity(
        "mismatch KL (k3)",
        lambda run: run.series("rollout_corr/k3_kl").mean,
        lambda value: f"{value:.2g}",
        Source(
            "Divergence of the policy that learns from the policy that sampled.",
            "mean over steps of mean (r - 1 - log r)",
            ("rollout_corr/k3_kl",),
            "every step",
        ),
    ),
    Quantity(
        "truncated or rejected, at least",
        lambda run: touched(run).mean,
        percent,
        Source(
            "Share of response tokens that the correction touched, at least: a token can be both "
            "truncated and rejected.",
            "mean over steps of the larger of both shares",
            (CUT, REJECTED),
            "every step",
        ),
    ),
    Quantity(
        "KV saturation, at most",
        lambda run: run.series("kv/saturation_max").max,
        percent,
        Source(
            "Largest share of any tensor that its scale clipped, in any step.",
            keys=("kv/saturation_max",),
            over="every step",
        ),
    ),
    CACHE,
    BYTES,
    SPEED,
    STEP,
)
