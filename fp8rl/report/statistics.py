"""The statistics of a report: is a series growing, has it spiked, do two arms differ.

    growth        Kendall's rank test over steps, and by what factor the series grew: exp(slope x
                  span) with the Theil-Sen slope of its logarithm, which single outliers do not move
    spikes        values at least 7 standard deviations from the mean of the 1000 before them, or of
                  as many as there are (the spike score of OLMo 2, arXiv 2501.00656)
    interval      mean and 95 % confidence interval over seeds, Student's t
    difference    of two arms with its interval: paired over the seeds that both have; Welch's, of
                  their means, where they have none in common; ratio is the same of logarithms

Steps of one run depend on each other, so that a rank test finds trends too readily: a report asks
for a small p and for growth that matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
SPIKE_SIGMAS = 7.0
SPIKE_WINDOW = 1000
SPIKE_HISTORY = 20  # values before the first that is judged


@dataclass(frozen=True)
class Growth:
    """Kendall's tau over steps with its two-sided p, and last over first by the fitted slope."""

    tau: float
    p: float
    factor: float


def growth(steps: Sequence[float], values: Sequence[float]) -> Growth | None:
    """Whether positive ``values`` grow over ``steps``; None for fewer than 10 of them."""
    pairs = [(step, math.log(v)) for step, v in zip(steps, values, strict=True) if v > 0]
    if len(pairs) < 10:
        return None
    from scipy.stats import kendalltau, theilslopes

    x, y = zip(*pairs, strict=True)
    if len(set(y)) == 1:
        return Growth(0.0, 1.0, 1.0)
    tau, p = kendalltau(x, y)
    slope = theilslopes(y, x).slope
    return Growth(float(tau), float(p), math.exp(float(slope) * (x[-1] - x[0])))


def spikes(values: Sequence[float]) -> list[int]:
    """The places of values that stand out from those before them; see the module."""
    found, series = [], np.asarray(values)
    for place in range(SPIKE_HISTORY, len(values)):
        before = series[max(0, place - SPIKE_WINDOW) : place]
        if abs(series[place] - before.mean()) >= SPIKE_SIGMAS * before.std(ddof=1) > 0:
            found.append(place)
    return found


class Interval(NamedTuple):
    """A mean and the ends of its interval, which are NaN where there was one value alone."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, with its 95 % interval from two values on."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Arm minus baseline, both by seed; None where one of them has no value."""
    if not arm or not baseline:
        return None
    paired = [value - baseline[seed] for seed, value in arm.items() if seed in baseline]
    if paired:
        return interval(paired)
    mean = fmean(arm.values()) - fmean(baseline.values())
    if min(len(arm), len(baseline)) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import ttest_ind

    test = ttest_ind(list(arm.values()), list(baseline.values()), equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Interval(mean, float(low), float(high))


def ratio(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Arm over baseline, of geometric means by seed; None where a side has no positive value."""
    logs = [{s: math.log(v) for s, v in side.items() if v > 0} for side in (arm, baseline)]
    found = difference(*logs)
    return None if found is None else Interval(*map(math.exp, found))
