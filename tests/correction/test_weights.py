import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import (
    MIS,
    TIS,
    BatchNormalize,
    ESSMixing,
    IcePop,
    Reject,
    Veto,
    correct,
    importance_ratios,
)

LEVELS = ["token", "sequence", "geometric"]


def one_row(*log_ratios):
    rollout = torch.full((1, len(log_ratios)), -5.0, dtype=torch.float64)
    train = rollout + torch.tensor([log_ratios], dtype=torch.float64)
    return train, rollout, torch.ones(1, len(log_ratios), dtype=torch.bool)


def weights(stage, *ratios):
    result = correct([stage], *one_row(*(math.log(r) for r in ratios)))
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
        result = correct([TIS(level=level, cap=100)], train, rollout, mask)
        assert result.weights[0].tolist() == pytest.approx([expected, 0, expected])
        ratios = importance_ratios(level, train, rollout, mask)
        assert ratios[0].tolist() == pytest.approx([expected, 1, expected])


def test_no_correction_weighs_kept_tokens_one_and_still_reports_raw_ratios():
    train, rollout, mask = one_row(1.0, 2.0, 3.0)
    mask[0, 2] = False
    result = correct([], train, rollout, mask)
    assert result.weights.tolist() == [[1, 1, 0]]
    assert torch.equal(result.kept, mask)
    raw = (math.e + math.e**2) / 2
    assert result.metrics()["rollout_corr/rollout_is_raw_mean"] == pytest.approx(raw)


@pytest.mark.parametrize("level", LEVELS)
def test_a_ratio_that_overflows_saturates_at_the_cap_and_never_at_zero(level):
    rollout, train = torch.tensor([[-1000.0], [0.0]]), torch.tensor([[0.0], [-1000.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    result = correct([TIS(level=level, cap=2.0)], train, rollout, mask)
    assert result.weights[:, 0].tolist() == [2.0, pytest.approx(math.exp(-20))]
    result = correct([MIS(level=level)], train, rollout, mask)
    assert not result.kept.any()
    assert importance_ratios(level, train, rollout, mask).isfinite().all()
    assert all(math.isfinite(value) for value in result.metrics().values())


def test_huge_log_ratios_of_both_signs_in_one_sequence_stay_finite():
    train = torch.tensor([[0.0, 0.0, -3e38, -3e38]])
    rollout = torch.tensor([[-3e38, -3e38, 0.0, 0.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert correct([TIS(level="sequence")], train, rollout, mask).weights.tolist() == [[1.0] * 4]


def test_ratios_are_raw_while_weights_are_truncated():
    result = correct([TIS(cap=2.0)], *one_row(math.log(6)))
    assert importance_ratios("token", *one_row(math.log(6))).item() == pytest.approx(6)
    assert result.weights.item() == 2


def test_weights_carry_no_gradient():
    train, rollout, mask = one_row(0.1, 0.2)
    result = correct([TIS()], train.requires_grad_(), rollout.requires_grad_(), mask)
    assert not result.weights.requires_grad
    assert not importance_ratios("token", train, rollout, mask).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_fp32_whatever_comes_in(dtype):
    train, rollout, mask = one_row(0.43, -0.57, 4.99, -3.3)
    train, rollout = train.to(dtype), rollout.to(dtype)
    result = correct([TIS()], train, rollout, mask)
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
    tis = correct([TIS(level=level, cap=cap)], b.old, b.rollout, b.mask)
    assert (tis.weights <= torch.tensor(cap)).all()
    assert torch.equal(tis.weights > 0, b.mask)
    assert torch.equal(tis.kept, b.mask)
    mis = correct([MIS(level=level, low=0.5, high=2.0)], b.old, b.rollout, b.mask)
    assert torch.equal(mis.weights > 0, mis.kept)
    assert ((mis.weights[mis.kept] >= 0.5) & (mis.weights[mis.kept] <= 2.0)).all()
    assert not (mis.kept & ~b.mask).any()
    ratios = importance_ratios(level, b.old, b.rollout, b.mask)
    inside = (ratios >= 0.5) & (ratios <= 2.0) & b.mask
    assert torch.equal(mis.kept, inside)


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_identical_policies_give_weights_of_exactly_one(make_batch, level, seed):
    b = make_batch(seed)
    for config in (TIS(level=level), MIS(level=level)):
        result = correct([config], b.old, b.old.clone(), b.mask)
        assert torch.equal(result.weights, b.mask.float())
        assert torch.equal(result.kept, b.mask)


def test_icepop_zeroes_a_weight_out_of_its_band_and_keeps_the_token_in_the_denominator():
    w, kept = weights(IcePop(low=0.5, high=5.0), 0.4, 0.6, 4.9, 5.1)
    assert w == pytest.approx([0, 0.6, 4.9, 0])
    assert kept == [True] * 4


def kept_of(stage, *ratios):
    return correct([stage], *one_row(*(math.log(r) for r in ratios))).kept[0].tolist()


@pytest.mark.parametrize(
    ("divergence", "high", "inside", "outside"),
    [("k2", 0.5 * math.log(2) ** 2, 1.99, 2.01), ("k3", 1 - math.log(2), 1.99, 2.01)],
)
def test_k2_and_k3_reject_a_token_by_its_divergence(divergence, high, inside, outside):
    stage = Reject(divergence=divergence, level="token", high=high)
    assert kept_of(stage, inside, 1, outside) == [True, True, False]
    below = {"k2": [0.51, 0.49], "k3": [0.46, 0.40]}  # k3 is not symmetric: 1 - ln 2 is at 0.449
    assert kept_of(stage, *below[divergence]) == [True, False]


def test_bounds_of_k1_are_on_the_ratio_and_not_on_its_inverse():
    assert kept_of(Reject(low=0.3, high=3.9), 0.27, 1 / 3, 3.8, 4.0) == [False, True, True, False]
    low = Reject(level="seq_sum", low=0.9, high=10.0)
    assert kept_of(low, 3.0, 3.0) == [True, True]  # 1 / 9 would be below 0.9
    assert kept_of(low, 0.5, 1.0) == [False, False]


def test_sequence_rejection_sums_averages_or_takes_the_largest():
    ratios = [2.0, 2.0, 1.0, 1.0]  # product 4, geometric mean sqrt(2), largest 2
    for level, bound in [("seq_sum", 4.0), ("seq_mean", 2**0.5), ("seq_max", 2.0)]:
        just = Reject(level=level, low=0.01, high=bound * 1.001)
        under = Reject(level=level, low=0.01, high=bound * 0.999)
        assert kept_of(just, *ratios) == [True] * 4, level
        assert kept_of(under, *ratios) == [False] * 4, level
    k2 = [0.5 * math.log(r) ** 2 for r in ratios]
    for level, bound in [("seq_sum", sum(k2)), ("seq_mean", sum(k2) / 4), ("seq_max", max(k2))]:
        assert kept_of(Reject(divergence="k2", level=level, high=bound * 1.001), *ratios)[0], level
        assert not kept_of(Reject(divergence="k2", level=level, high=bound * 0.999), *ratios)[0]


def test_a_token_that_the_trainer_holds_for_impossible_vetoes_its_sequence():
    rollout = torch.full((2, 3), -20.0)
    train = rollout.clone()
    train[0, 1] += math.log(0.9e-4)
    train[1, 1] += math.log(1.1e-4)
    result = correct([Veto(floor=1e-4)], train, rollout, torch.ones(2, 3, dtype=torch.bool))
    assert result.kept.tolist() == [[False] * 3, [True] * 3]


def test_rejections_and_weights_combine_and_their_order_does_not_matter():
    stages = [Reject(divergence="k3", level="token", high=0.5), TIS(cap=1.5), Veto(floor=0.2)]
    row = one_row(*(math.log(r) for r in (0.9, 1.8, 4.0)))
    result = correct(stages, *row)
    assert result.weights[0].tolist() == pytest.approx([0.9, 1.5, 0])
    assert result.kept.tolist() == [[True, True, False]]
    again = correct(stages[::-1], *row)
    assert torch.equal(again.weights, result.weights) and torch.equal(again.kept, result.kept)


def test_batch_normalized_weights_average_one_over_kept_tokens_or_over_sequences(make_batch):
    b = make_batch(3, rows=6, tokens=11)
    for level in ("token", "sequence"):
        stages = [MIS(low=0.6, high=1.7), BatchNormalize(level=level)]
        result = correct(stages, b.old, b.rollout, b.mask)
        plain = correct(stages[:1], b.old, b.rollout, b.mask)
        assert torch.equal(result.kept, plain.kept)
        ratio = result.weights[result.kept] / plain.weights[plain.kept]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        rows = [w[k].mean() for w, k in zip(result.weights, result.kept, strict=True) if k.any()]
        means = {"token": result.weights[result.kept].mean(), "sequence": torch.stack(rows).mean()}
        assert means[level].item() == pytest.approx(1)


def test_weights_that_are_all_zero_are_not_normalized_to_nan():
    row = one_row(3.0, 3.0)
    result = correct([IcePop(), BatchNormalize()], *row)
    assert result.weights.tolist() == [[0, 0]]
    assert result.metrics()["rollout_corr/rollout_is_eff_sample_size"] == 0


def effective_sample_size(w):
    return (w.sum() ** 2 / (len(w) * (w**2).sum())).item()


@given(seed=st.integers(0, 2**32), target=st.floats(0.05, 0.99))
@settings(deadline=None, max_examples=50)
def test_ess_mixing_moves_weights_to_one_just_until_the_target_is_reached(make_batch, seed, target):
    b = make_batch(seed, rows=5, tokens=9, mismatch=1.0)
    b.mask[0, 0] = True
    plain = correct([TIS(cap=50)], b.old, b.rollout, b.mask).weights[b.mask].double()
    mixed = correct([TIS(cap=50), ESSMixing(target=target)], b.old, b.rollout, b.mask)
    got = mixed.weights[b.mask].double()
    assert not mixed.weights[~b.mask].any()
    before = effective_sample_size(plain)
    if before >= target:
        torch.testing.assert_close(got, plain)
        return
    assert effective_sample_size(got) == pytest.approx(target, abs=1e-4)
    apart = (plain - 1).abs() > 1e-2
    mixing = (got - 1)[apart] / (plain - 1)[apart]
    torch.testing.assert_close(mixing, mixing[:1].expand_as(mixing), atol=1e-4, rtol=1e-3)
    assert 0 < mixing[0] < 1


@pytest.mark.parametrize(
    "rescaling", [BatchNormalize(), BatchNormalize(level="sequence"), ESSMixing(target=0.7)]
)
def test_metrics_after_rescaling_are_those_of_the_new_weights(make_batch, rescaling):
    b = make_batch(5, rows=6, tokens=40, mismatch=1.0)
    result = correct([MIS(low=0.1, high=9), rescaling], b.old, b.rollout, b.mask)
    w, metrics = result.weights[result.kept].double(), result.metrics()
    for name, value in {
        "mean": w.mean(),
        "std": w.std(correction=0),
        "max": w.max(),
        "min": w.min(),
        "eff_sample_size": effective_sample_size(w),
    }.items():
        assert metrics[f"rollout_corr/rollout_is_{name}"] == pytest.approx(float(value), rel=1e-5)


def test_two_stages_of_rescaling_are_the_product_of_both(make_batch):
    b = make_batch(6, rows=4, tokens=30, mismatch=1.0)
    stages = [TIS(cap=20), ESSMixing(target=0.8), BatchNormalize()]
    result = correct(stages, b.old, b.rollout, b.mask)
    w = result.weights[b.mask].double()
    assert w.mean().item() == pytest.approx(1)
    assert effective_sample_size(w) == pytest.approx(0.8, abs=1e-4)
