"""Checks of the training and of the engine.

saturation   what the KV scales clip
reward       the held-out reward does not fall for good
gradients    their norms are finite, without spikes
proven       every update was read back
drift        the drift watch, where it ran, did not warn
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from fp8rl.config.rollout import FP8_CACHE
from fp8rl.report.check import OURS, Check
from fp8rl.report.data import RunData
from fp8rl.report.drift import worst_layer
from fp8rl.report.page import Source, State
from fp8rl.report.statistics import SPIKE_HISTORY, spikes
from fp8rl.report.words import percent, since, warn_saturation

ERRORS = 3.0  # standard errors that a reward may fall by
EVALUATIONS = 3  # in a row, whose mean is compared


def saturation(run: RunData) -> Iterator[Check]:
    """What the KV scales clip, against the run's own threshold."""
    if run.precision not in FP8_CACHE:
        return
    series, limit = run.series("kv/saturation_max"), warn_saturation(run.config)
    over = [step for step, v in zip(series.steps, series.values, strict=True) if v > (limit or 0)]
    known = bool(series) and limit is not None
    found = percent(series.max)
    if known and over:
        found += f"; above in {len(over)} of {len(series)} steps, first in step {over[0]}"
    yield Check(
        "KV-cache saturation",
        "unknown" if not known else "watch" if over else "good",
        found if series else "not measured",
        f"at most {percent(limit)}",
        Source(
            "The largest share of q, k or v of any layer beyond what its FP8 scale can hold.",
            "share of elements with |x| > 448 x scale, largest of all tensors in a step",
            (series.key,),
            series.over,
            "the run's kv_scales.warn_saturation",
        ),
    )


def reward(run: RunData) -> Iterator[Check]:
    """The held-out reward has not fallen for good."""
    series = run.series("reward/heldout")
    values, prompts = series.values, int(run.config["task"].get("heldout_prompts", 1))
    kept = min(EVALUATIONS, len(values) // 2)
    state: State = "unknown"
    found = f"{len(values)} evaluations are too few to tell"
    if kept:
        windows = [fmean(values[i : i + kept]) for i in range(len(values) - kept + 1)]
        best, end = max(windows), windows[-1]
        error = math.sqrt((_variance(best) + _variance(end)) / (prompts * kept))
        fallen = best - end > ERRORS * error
        lost = fallen and best - end > (best - windows[0]) / 2
        state = "bad" if lost else "watch" if fallen else "good"
        found = f"{end:.3f} at the end, {best:.3f} at best"
        found += ": collapsed" if lost else ": falling" if fallen else ""
    yield Check(
        "Held-out reward",
        state,
        found,
        f"no fall by more than {ERRORS:g} standard errors",
        Source(
            f"Means of {kept or 1} evaluations in a row: the last ones against the best ones. Bad "
            "where more than half of what was gained is lost again.",
            f"fall > {ERRORS:g} sqrt((b (1 - b) + e (1 - e)) / (n m)), n = {prompts} prompts, "
            f"m = {kept or 1}: the largest error that a reward in [0, 1] can have",
            (series.key,),
            series.over,
            OURS,
        ),
    )


def gradients(run: RunData) -> Iterator[Check]:
    """Gradient norms: finite, no spikes."""
    lines = [line for line in run.metrics if "grad_norm" in line]
    broken = [line["step"] for line in lines if not math.isfinite(float(line["grad_norm"]))]
    series = run.series("grad_norm")
    peaks = [series.steps[place] for place in spikes(series.values)]
    state: State = "unknown"
    found = "not measured"
    if lines:
        state = "bad" if broken else "watch" if peaks else "good"
        short = len(series) <= SPIKE_HISTORY
        found = "finite; too short for spikes" if short else "finite, no spikes"
        if broken:
            found = f"not finite in {len(broken)} steps, first in step {broken[0]}"
        elif peaks:
            found = f"{len(peaks)} spikes, first in step {peaks[0]}"
    yield Check(
        "Gradient norms",
        state,
        found,
        "finite, no spikes",
        Source(
            "A spike stands at least 7 standard deviations from the mean of the steps before it.",
            "|g - mean| >= 7 std, over the 1000 steps before, or all there are (20 at least)",
            (series.key,),
            series.over,
            "spike score of OLMo 2, arXiv 2501.00656",
        ),
    )


def proven(run: RunData) -> Iterator[Check]:
    """Every version that was sampled was read back from the engine."""
    sent = [line for line in run.metrics if "sync/seconds" in line]
    whole = bool(sent) and len(sent) == len(run.metrics)
    yield Check(
        "Updates proven",
        "good" if whole else "unknown",
        f"{len(sent)} of {len(run.metrics)}, by read-back",
        "all of them",
        Source(
            "A step is recorded only once the engine has read back every FP8 byte and scale that "
            "it holds and found them equal to what was published; a failed proof ends the run.",
            "steps with sync/seconds, of all steps recorded",
            ("sync/seconds",),
            run.series("sync/seconds").over,
            "by construction: fp8rl/loop.py, publish",
        ),
    )


def drift(run: RunData) -> Iterator[Check]:
    """Warnings of the drift watch, where it ran."""
    series = run.series("drift/warnings")
    if not series:
        return
    count = int(series.total or 0)
    yield Check(
        "Drift warnings",
        "watch" if count else "good",
        f"{count} in {len(series)} probes{_worst_layer(run)}{since(run.fell_back)}",
        "none",
        Source(
            "What of a layer, of its router or of all log-probs differs more between engine and "
            "trainer than the watch allows.",
            "thresholds passed, summed over probes",
            (series.key,),
            series.over,
            "the thresholds of the run's drift watch (drift.warn_*)",
        ),
    )


def _worst_layer(run: RunData) -> str:
    """In which layer and step engine and trainer were farthest apart, and most of it why."""
    worst = worst_layer(run.metrics)
    return f"; most in {worst.words}" if worst else ""


def _variance(share: float) -> float:
    """The largest variance that a number in [0, 1] with this mean can have."""
    return max(0.0, share * (1 - share))
