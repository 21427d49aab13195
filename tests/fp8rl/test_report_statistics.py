"""The statistics of a report, against what is known of them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.report.statistics import (
    SPIKE_HISTORY,
    SPIKE_SIGMAS,
    difference,
    growth,
    interval,
    ratio,
    spikes,
)

FLOATS = st.floats(-1e3, 1e3)


def test_growth_of_an_exponential_is_its_factor_and_an_outlier_does_not_move_it() -> None:
    values = [1e-4 * 2 ** (step / 10) for step in range(41)]
    values[20] = 5.0
    found = growth(range(41), values)
    assert found is not None
    assert found.factor == pytest.approx(16, rel=0.01)
    assert found.tau > 0.9 and found.p < 1e-9


def test_noise_does_not_grow_and_a_few_steps_say_nothing() -> None:
    rng = random.Random(0)
    noise = [math.exp(rng.gauss(0, 0.5)) for _ in range(100)]
    found = growth(range(100), noise)
    assert found is not None
    assert found.p > 0.01 and 0.5 < found.factor < 2
    assert growth(range(9), noise[:9]) is None
    assert growth(range(20), [1.0] * 20) is not None


def test_one_value_far_above_all_before_it_is_a_spike() -> None:
    rng = random.Random(0)
    norms = [1 + rng.gauss(0, 0.1) for _ in range(60)]
    assert spikes(norms) == []
    norms[40] = 1 + 0.2 * SPIKE_SIGMAS
    assert spikes(norms) == [40]
    assert spikes([100.0, *norms[1:SPIKE_HISTORY]]) == []  # nothing before it to hold it against


def test_an_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3))  # t(0.975, 2)
    alone = interval([1.5])
    assert alone.mean == 1.5 and math.isnan(alone.low) and math.isnan(alone.high)


@given(st.lists(FLOATS, min_size=2, max_size=6), FLOATS)
def test_a_shift_of_all_seeds_is_found_exactly_when_they_are_paired(
    values: list[float], shift: float
) -> None:
    baseline = dict(enumerate(values))
    found = difference({seed: value + shift for seed, value in baseline.items()}, baseline)
    assert found is not None
    assert found.low == pytest.approx(shift, abs=1e-6)
    assert found.high == pytest.approx(shift, abs=1e-6)


def test_other_seeds_are_compared_by_welchs_test() -> None:
    found = difference({0: 1.0, 1: 2.0, 2: 3.0}, {3: 2.0, 4: 4.0, 5: 6.0})
    assert found is not None
    assert found.mean == -2
    # standard error sqrt(1/3 + 4/3); 50/17 degrees of freedom: t(0.975) = 3.2188
    assert found.low == pytest.approx(-2 - 3.2188 * math.sqrt(5 / 3), abs=1e-3)


def test_of_seeds_that_overlap_those_in_common_are_paired() -> None:
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.9, 7: 100.0}, {0: 0.4, 1: 0.5, 2: 0.9, 9: -100.0}
    both = {seed: ours[seed] - theirs[seed] for seed in (0, 1, 2)}
    assert difference(ours, theirs) == interval([*both.values()])


def test_one_seed_on_a_side_has_a_difference_without_an_interval() -> None:
    found = difference({0: 1.0}, {1: 3.0, 2: 5.0})
    assert found is not None
    assert found.mean == -3 and math.isnan(found.low)
    assert difference({}, {0: 1.0}) is None


def test_a_ratio_is_of_geometric_means() -> None:
    found = ratio({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0})
    assert found is not None
    assert found.mean == pytest.approx(4)
    assert found.low * found.high == pytest.approx(16)
    assert ratio({0: 0.0}, {0: 1.0}) is None
