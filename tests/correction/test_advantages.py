import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8rl.correction import ShapeError, ValueRangeError, group_advantages


def test_rewards_are_normalized_within_each_group_by_the_sample_deviation():
    got = group_advantages(torch.tensor([0.0, 1.0, 10.0, 30.0]), 2, eps=0.0)
    assert got.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)] * 2)
    assert got.dtype == torch.float32


@given(value=st.floats(-1e6, 1e6), n=st.integers(2, 33))
@settings(deadline=None)
@example(value=0.1, n=3)  # three times 0.1, divided by three, is not 0.1
def test_a_group_of_equal_rewards_gives_exact_zeros(value, n):
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((n,), value, dtype=dtype)
        assert not group_advantages(rewards, n, eps=0.0).any()
        assert not group_advantages(rewards, n, normalize=False).any()


@given(seed=st.integers(0, 2**32), n=st.integers(2, 16))
@settings(deadline=None, max_examples=30)
def test_groups_do_not_see_each_other_and_have_mean_zero(seed, n):
    rewards = torch.rand(3 * n, generator=torch.Generator().manual_seed(seed))
    got = group_advantages(rewards, n)
    alone = torch.cat([group_advantages(part, n) for part in rewards.split(n)])
    torch.testing.assert_close(got, alone)
    torch.testing.assert_close(got.view(3, n).mean(1), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(("shape", "n"), [((6,), 4), ((4,), 1), ((4,), 0), ((2, 2), 2)])
def test_rewards_that_are_not_whole_groups_are_refused(shape, n):
    with pytest.raises(ShapeError, match="rewards: shape"):
        group_advantages(torch.zeros(shape), n)


def test_a_reward_that_is_not_finite_is_refused_with_its_place():
    with pytest.raises(ValueRangeError, match=r"rewards: nan at \[2\]"):
        group_advantages(torch.tensor([0.0, 1.0, math.nan, 1.0]), 2)


def test_without_normalization_an_advantage_is_the_distance_from_the_groups_mean():
    """Dr.GRPO's: the spread of a group does not change how much it counts."""
    got = group_advantages(torch.tensor([0.0, 1.0, 10.0, 30.0]), 2, normalize=False)
    assert got.tolist() == [-0.5, 0.5, -10.0, 10.0]
