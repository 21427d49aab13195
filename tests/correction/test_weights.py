import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import MIS, TIS, NoCorrection, correct

LEVELS = ["token", "sequence", "geometric"]


def one_row(*log_ratios):
    rollout = torch.full((1, len(log_ratios)), -5.0, dtype=torch.float64)
    train = rollout + torch.tensor([log_ratios], dtype=torch.float64)
    return train, rollout, torch.ones(1, len(log_ratios), dtype=torch.bool)


def weights(config, *log_ratios):
    result = correct(config, *one_row(*(math.log(r) for r in log_ratios)))
    return result.weights[0].tolist(), result.kept[0].tolist()


def test_token_tis_is_the_ratio_truncated_at_the_cap():
    w, kept = weights(TIS(cap=2.0), 0.25, 1.0, 1.5, 3.0)
    assert w == pytest.approx([0.25, 1.0, 1.5, 2.0])
    assert all(kept)


def test_token_mis_bounds_apply_to_the_ratio_and_not_to_its_inverse():
    # 1 / 3 and 4 would be inside [0.3, 3.5] and [1 / 3.5, 1 / 0.3] the other way round
    w, kept = weights(MIS(low=0.3, high=3.9), 0.27, 1 / 3, 3.8, 4.0)
    assert kept == [False, True, True, False]
    assert w == pytest.approx([0, 1 / 3, 3.8, 0])


def test_sequence_level_multiplies_and_geometric_level_averages_logs():
    w, _ = weights(TIS(level="sequence", cap=100), 2.0, 0.5, 8.0)
    assert w == pytest.approx([8.0] * 3)
    w, _ = weights(TIS(level="geometric", cap=100), 2.0, 0.5, 8.0)
    assert w == pytest.approx([2.0] * 3)
    w, _ = weights(TIS(level="sequence", cap=3), 2.0, 0.5, 8.0)
    assert w == pytest.approx([3.0] * 3)


def test_sequence_mis_drops_the_whole_sequence_and_geometric_keeps_it():
    assert weights(MIS(level="sequence", high=3), 2.0, 2.0, 2.0) == ([0, 0, 0], [False] * 3)
    w, kept = weights(MIS(level="geometric", high=3), 2.0, 2.0, 2.0)
    assert (w, kept) == (pytest.approx([2.0] * 3), [True] * 3)


def test_masked_tokens_take_no_part_in_sequence_and_geometric_ratios():
    train, rollout, mask = one_row(math.log(2), 7.0, math.log(8))
    mask[0, 1] = False
    for level, expected in [("sequence", 16.0), ("geometric", 4.0)]:
        result = correct(TIS(level=level, cap=100), train, rollout, mask)
        assert result.weights[0].tolist() == pytest.approx([expected, 0, expected])
        assert result.ratios[0].tolist() == pytest.approx([expected, 1, expected])


def test_no_correction_weighs_kept_tokens_one_and_still_reports_raw_ratios():
    train, rollout, mask = one_row(1.0, 2.0, 3.0)
    mask[0, 2] = False
    result = correct(NoCorrection(), train, rollout, mask)
    assert result.weights.tolist() == [[1, 1, 0]]
    assert torch.equal(result.kept, mask)
    assert result.ratios[0].tolist() == pytest.approx([math.e, math.e**2, 1])


@pytest.mark.parametrize("level", LEVELS)
def test_a_ratio_that_overflows_saturates_at_the_cap_and_never_at_zero(level):
    rollout, train = torch.tensor([[-1000.0], [0.0]]), torch.tensor([[0.0], [-1000.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    result = correct(TIS(level=level, cap=2.0), train, rollout, mask)
    assert result.weights[:, 0].tolist() == [2.0, pytest.approx(math.exp(-20))]
    result = correct(MIS(level=level), train, rollout, mask)
    assert not result.kept.any()
    assert result.ratios.isfinite().all()


def test_huge_log_ratios_of_both_signs_in_one_sequence_stay_finite():
    train = torch.tensor([[0.0, 0.0, -3e38, -3e38]])
    rollout = torch.tensor([[-3e38, -3e38, 0.0, 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert correct(TIS(level="sequence"), train, rollout, mask).weights.tolist() == [[1.0] * 4]


def test_ratios_are_raw_while_weights_are_truncated():
    result = correct(TIS(cap=2.0), *one_row(math.log(6)))
    assert result.ratios.item() == pytest.approx(6)
    assert result.weights.item() == 2


def test_weights_carry_no_gradient():
    train, rollout, mask = one_row(0.1, 0.2)
    result = correct(TIS(), train.requires_grad_(), rollout.requires_grad_(), mask)
    assert not result.weights.requires_grad and not result.ratios.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_fp32_whatever_comes_in(dtype):
    train, rollout, mask = one_row(0.43, -0.57, 4.99, -3.3)
    train, rollout = train.to(dtype), rollout.to(dtype)
    result = correct(TIS(), train, rollout, mask)
    assert result.weights.dtype == torch.float32
    torch.testing.assert_close(
        result.weights, (train.double() - rollout.double()).exp().clamp(max=2).float()
    )


@pytest.mark.parametrize("level", LEVELS)
@given(
    seed=st.integers(0, 2**32),
    mismatch=st.sampled_from([0.0, 0.1, 3.0, 1000.0]),
    cap=st.floats(0.01, 1e6),
)
@settings(deadline=None, max_examples=50)
def test_weights_lie_in_their_bounds_and_are_zero_exactly_where_nothing_is_kept(
    make_batch, level, seed, mismatch, cap
):
    b = make_batch(seed, mismatch=mismatch)
    tis = correct(TIS(level=level, cap=cap), b.old, b.rollout, b.mask)
    assert (tis.weights <= torch.tensor(cap)).all()
    assert torch.equal(tis.weights > 0, b.mask)
    assert torch.equal(tis.kept, b.mask)
    mis = correct(MIS(level=level, low=0.5, high=2.0), b.old, b.rollout, b.mask)
    assert torch.equal(mis.weights > 0, mis.kept)
    assert ((mis.weights[mis.kept] >= 0.5) & (mis.weights[mis.kept] <= 2.0)).all()
    assert not (mis.kept & ~b.mask).any()
    inside = (mis.ratios >= 0.5) & (mis.ratios <= 2.0) & b.mask
    assert torch.equal(mis.kept, inside)


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_identical_policies_give_weights_of_exactly_one(make_batch, level, seed):
    b = make_batch(seed)
    for config in (TIS(level=level), MIS(level=level)):
        result = correct(config, b.old, b.old.clone(), b.mask)
        assert torch.equal(result.weights, b.mask.float())
        assert torch.equal(result.kept, b.mask)
