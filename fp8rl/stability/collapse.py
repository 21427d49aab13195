"""Has a run collapsed, when, and which signal was out of bounds first?

A run has collapsed at its first held-out evaluation below half of the best one before it, if

    the loss is no noise:   best - found > 3 sqrt(best (1 - best) / n + found (1 - found) / n)
                            for n held-out prompts, one answer each
    it stays:               no later evaluation reaches half of the best, and there are two below it
                            at least

or when its numbers broke, at the step where they did. A run that never learned has not collapsed.

The cause is looked for between the best evaluation and the collapse, among the signals of
`SIGNALS`: the one that leaves its bounds first. Those that had left them before the best
evaluation, and not come back, are named after the others: the run learned all the same. A signal is
the median of three steps, so that a single odd batch is none. That one comes first does not prove
that it is the cause: it says where to look. A pure function of a run's metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from fp8rl.run_dir import Metrics

SIGMAS = 3.0
MEDIAN_OF = 3  # steps
EARLY_STEPS = 10  # whose median gradient norm is the usual one


@dataclass(frozen=True)
class Signal:
    """Something that goes wrong before a reward does.

    bounds: from the signal's values so far to the lowest and the highest that are in order.
    """

    name: str
    key: str
    bounds: Callable[[Sequence[float]], tuple[float, float]]
    rule: str


SIGNALS = (
    Signal(
        "mismatch",
        "rollout_corr/token_mult_prob_error",
        lambda _: (0.0, 1.2),
        "mean exp|dlogp| above 1.2, where 1.05 is acceptable",
    ),
    Signal(
        "effective sample size",
        "rollout_corr/rollout_is_raw_eff_sample_size",
        lambda _: (0.5, math.inf),
        "untruncated weights use less than half of the tokens",
    ),
    Signal(
        "entropy",
        "policy/entropy",
        lambda seen: (0.01, 1.5 * seen[0]),
        "below 0.01 nats a token, or above 1.5 times that of the first step",
    ),
    Signal(
        "KV saturation",
        "kv/saturation_max",
        lambda _: (0.0, 0.01),
        "more than 1 % of the elements of a tensor clipped",
    ),
    Signal(
        "gradient norm",
        "grad_norm",
        lambda seen: (0.0, 10 * median(seen[:EARLY_STEPS])),
        f"above 10 times the median of the first {EARLY_STEPS} steps",
    ),
)


@dataclass(frozen=True)
class Cause:
    """A signal out of its bounds: from which step on, its value there, and the rule it broke."""

    signal: str
    step: int
    value: float
    rule: str


@dataclass(frozen=True)
class Collapse:
    """When a run lost what it had learned; ``causes`` in the order of their steps.

    found: None where the run's numbers broke.
    """

    step: int
    best: float | None
    best_step: int
    found: float | None
    causes: tuple[Cause, ...]

    @property
    def why(self) -> str:
        """The first cause, in words."""
        if not self.causes:
            return "no signal that is watched was out of bounds before it"
        first = self.causes[0]
        found = f"{first.value:.3g} ({first.rule})"
        if first.step < self.best_step:
            return f"{first.signal} from step {first.step} on, while it still learned: {found}"
        return f"{first.signal} first, at step {first.step}: {found}"


def collapse(
    lines: Sequence[Metrics], *, reward: str, prompts: int, broke_at: int | None = None
) -> Collapse | None:
    """Look whether a run has collapsed; None where it has not.

    Args:
        lines: the run's metrics, by step.
        reward: key of the held-out reward.
        prompts: how many prompts it is the mean over.
        broke_at: the step at which its numbers broke; None where it went on to its end.
    """
    evaluations = [
        (int(line["step"]), float(line[reward]))
        for line in lines
        if reward in line and math.isfinite(float(line[reward]))
    ]
    best_step, best = 0, None
    for place, (step, found) in enumerate(evaluations):
        if best is not None and found < best / 2:
            rest = [value for _, value in evaluations[place:]]
            noise = SIGMAS * math.sqrt((best * (1 - best) + found * (1 - found)) / prompts)
            if best - found > noise and len(rest) > 1 and max(rest) < best / 2:
                causes = _causes(lines, best_step, step)
                return Collapse(step, best, best_step, found, causes)
        elif best is None or found > best:
            best_step, best = step, found
    if broke_at is None:
        return None
    return Collapse(broke_at, best, best_step, None, _causes(lines, best_step, broke_at))


def _causes(lines: Sequence[Metrics], after: int, until: int) -> tuple[Cause, ...]:
    """The signals that leave their bounds in [after, until], in that order; then earlier ones."""
    found = [_left(signal, lines, after, until) for signal in SIGNALS]
    causes = [cause for cause in found if cause is not None]
    return tuple(sorted(causes, key=lambda cause: (cause.step < after, cause.step)))


def _left(signal: Signal, lines: Sequence[Metrics], after: int, until: int) -> Cause | None:
    """Where a signal first leaves its bounds in [after, until], or left them before for good."""
    seen: list[float] = []
    outside: Cause | None = None
    for line in lines:
        step = int(line["step"])
        if signal.key not in line or step > until:
            continue
        value = float(line[signal.key])
        seen.append(value if math.isfinite(value) else math.inf)
        smooth = median(seen[-MEDIAN_OF:])
        low, high = signal.bounds(seen)
        if len(seen) < MEDIAN_OF or low <= smooth <= high:
            outside = None
        elif outside is None:
            outside = Cause(signal.name, step, smooth, signal.rule)
            if step >= after:
                return outside
    return outside
