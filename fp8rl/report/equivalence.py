"""An arm against its baseline: the same, worse, better, or undecided. Numbers in, a verdict out.

The one rule by which studies and comparisons of runs judge a held-out reward.

    d_s       = reward of the arm with seed s - reward of the baseline with seed s
    interval  = mean(d) +- t(0.975, n - 1) std(d) / sqrt(n)                   95 %, Student's t
    p         = share of the 2^n sign patterns e with |mean(e d)| >= |mean(d)|    two-sided; exact
                up to 12 seeds, of 10,000 patterns drawn beyond

    same       the whole interval lies within +- margin
    worse      it lies below 0          better     it lies above 0
    undecided  all else: too few seeds, or too much noise between them

"same" is asked first: an interval that excludes 0 and still lies within the margin is a difference
that does not matter. Both arms start from the same weights with each seed, and see the same
prompts, which is why they are paired. With n seeds p is never below 2 / 2^n (0.0625 for five): it
stands beside the interval as a check that needs no normal distribution.

Positive numbers such as a mismatch are compared by a factor, whose interval is that of the
differences of their logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from fp8rl.report.statistics import difference, ratio

EXACT_SEEDS, SAMPLED_PATTERNS = 12, 10_000
MARGIN = 0.03  # of a held-out reward, unless a study has its own
Word = Literal["same", "worse", "better", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """What became of an arm beside its baseline; ``low``, ``high`` and ``p`` None for one seed.

    arm, baseline: their means over the seeds that both have. n: how many those are.
    """

    word: Word
    arm: float
    baseline: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    margin: float


@dataclass(frozen=True)
class Factor:
    """How many times as large one arm's numbers are; the interval is of the geometric mean.

    low, high: None where fewer than two seeds can be compared.
    """

    factor: float
    low: float | None
    high: float | None

    @property
    def word(self) -> Literal["larger", "smaller", "undecided"]:
        """Where the interval lies."""
        if self.low is None or self.high is None:
            return "undecided"
        return "larger" if self.low > 1 else "smaller" if self.high < 1 else "undecided"


def judge(arm: Mapping[int, float], baseline: Mapping[int, float], margin: float) -> Verdict | None:
    """Hold an arm's rewards by seed against its baseline's; None where no seed is in both."""
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    ours, theirs = ({s: values[s] for s in seeds} for values in (arm, baseline))
    found = difference(ours, theirs)
    assert found is not None  # there are seeds
    low, high = _known(found.low), _known(found.high)
    word: Word = "undecided"
    if low is not None and high is not None:
        if -margin < low and high < margin:
            word = "same"
        elif high < 0:
            word = "worse"
        elif low > 0:
            word = "better"
    return Verdict(
        word=word,
        arm=fmean(ours.values()),
        baseline=fmean(theirs.values()),
        difference=found.mean,
        low=low,
        high=high,
        p=_sign_flips([ours[s] - theirs[s] for s in seeds]) if low is not None else None,
        n=len(seeds),
        margin=margin,
    )


def factor(
    arm: Mapping[int, float], baseline: Mapping[int, float], *, paired: bool
) -> Factor | None:
    """How many times as large positive numbers are; None where an arm has none.

    ``paired``: by the seeds that both have; else the arms are independent (other models, say), and
    the interval is Welch's.
    """
    if paired:
        both = arm.keys() & baseline.keys()
        arm, baseline = ({seed: side[seed] for seed in both} for side in (arm, baseline))
    else:
        baseline = {-1 - seed: value for seed, value in baseline.items()}  # no seed is in both
    found = ratio(arm, baseline)
    return None if found is None else Factor(found.mean, _known(found.low), _known(found.high))


def _known(end: float) -> float | None:
    """The end of an interval; None where there is none."""
    return None if math.isnan(end) else end


def _sign_flips(differences: list[float]) -> float:
    """Two-sided p of a mean, if each difference might as well have the other sign."""
    import numpy as np
    from scipy.stats import permutation_test

    test = permutation_test(
        (np.array(differences),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=math.inf if len(differences) <= EXACT_SEEDS else SAMPLED_PATTERNS,
        vectorized=True,
        rng=0,
    )
    return float(test.pvalue)
