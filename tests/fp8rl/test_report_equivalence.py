"""The verdict on an arm: known values, and how often it errs in simulated studies."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.report.equivalence import factor, judge

MARGIN = 0.03
STUDIES, SEEDS = 600, 5
rewards = st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=2, max_size=6)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_interval_is_students_of_the_paired_differences() -> None:
    base = [0.5, 0.7, 0.2, 0.9, 0.4]
    arm = [b + d for b, d in zip(base, (0.01, 0.02, 0.03, 0.04, 0.05), strict=True)]
    found = judge(by_seed(arm), by_seed(base), MARGIN)
    assert found is not None and found.low is not None and found.high is not None
    half = 2.7764451 * 0.0158113883 / math.sqrt(5)  # t(0.975, 4), and the sample's deviation
    assert found.difference == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((0.03 - half, 0.03 + half), abs=1e-8)
    assert found.n == 5
    assert found.p == pytest.approx(2 / 2**5), "only all signs and none reach a mean that large"
    assert found.word == "better"


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], "same"),
        ([-0.012, -0.01, -0.011, -0.009, -0.01], "same"),  # excludes 0, and does not matter
        ([-0.3, -0.28, -0.31, -0.33, -0.29], "worse"),
        ([0.3, 0.28, 0.31, 0.33, 0.29], "better"),
        ([-0.3, 0.3, -0.2, 0.2, 0.01], "undecided"),
        ([-0.3], "undecided"),  # one seed says nothing about others
    ],
)
def test_the_word_follows_from_interval_and_margin(differences: list[float], word: str) -> None:
    base = by_seed([0.5] * len(differences))
    arm = {seed: 0.5 + d for seed, d in enumerate(differences)}
    found = judge(arm, base, MARGIN)
    assert found is not None
    assert found.word == word


def test_only_seeds_that_both_have_are_compared() -> None:
    found = judge({0: 0.5, 1: 0.6, 7: 0.0}, {0: 0.5, 1: 0.6, 2: 0.9}, MARGIN)
    assert found is not None
    assert (found.n, found.difference, found.word) == (2, 0.0, "same")
    assert judge({0: 0.5}, {1: 0.5}, MARGIN) is None


@given(rewards, rewards)
@settings(max_examples=30, deadline=None)
def test_exchanging_the_arms_turns_the_verdict_round(
    ours: dict[int, float], theirs: dict[int, float]
) -> None:
    there, back = judge(ours, theirs, MARGIN), judge(theirs, ours, MARGIN)
    assert (there is None) == (back is None)
    if there is not None and back is not None:
        opposite = {"better": "worse", "worse": "better"}
        assert back.word == opposite.get(there.word, there.word)
        assert back.p == there.p


def simulated(mean: float, deviation: float) -> list[tuple[str, float, float]]:
    """Word and interval of many studies whose differences are normal."""
    rng, found = random.Random(0), []
    for _ in range(STUDIES):
        base = {seed: rng.uniform(0.3, 0.7) for seed in range(SEEDS)}
        arm = {seed: value + rng.gauss(mean, deviation) for seed, value in base.items()}
        verdict = judge(arm, base, MARGIN)
        assert verdict is not None and verdict.low is not None and verdict.high is not None
        found.append((verdict.word, verdict.low, verdict.high))
    return found


def test_the_interval_covers_the_truth_in_95_of_100_studies() -> None:
    covered = sum(low <= 0.02 <= high for _, low, high in simulated(0.02, 0.05)) / STUDIES
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / STUDIES)


def test_arms_that_are_alike_are_seldom_called_worse_and_unlike_ones_seldom_the_same() -> None:
    error = 0.025 + 4 * math.sqrt(0.025 * 0.975 / STUDIES)
    alike = [word for word, _, _ in simulated(0.0, 0.05)]
    assert alike.count("worse") / STUDIES < error
    apart = [word for word, _, _ in simulated(-MARGIN, 0.01)]
    assert apart.count("same") / STUDIES < error
    clear = [word for word, _, _ in simulated(-0.2, 0.05)]
    assert clear.count("worse") / STUDIES > 0.95


def test_a_factor_is_of_geometric_means() -> None:
    base = by_seed([1e-3, 2e-3, 8e-3])
    double = {seed: 2 * value for seed, value in base.items()}
    found = factor(double, base, paired=True)
    assert found is not None and found.low is not None and found.high is not None
    assert (found.factor, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.word == "larger"
    apart = factor(double, base, paired=False)
    assert apart is not None
    assert apart.factor == pytest.approx(2)
    assert apart.word == "undecided", "the spread of the models is in it"
    assert factor({0: 0.0}, base, paired=True) is None, "a mismatch of 0 has no factor"
