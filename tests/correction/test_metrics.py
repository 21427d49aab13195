"""Every metric against its definition, written out with float64 and plain torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import (
    MIS,
    TIS,
    IcePop,
    LogProbError,
    MaskError,
    Reject,
    by_age,
    by_position,
    correct,
    correction_metrics,
    group_metrics,
)

ALL = torch.ones(1, 3, dtype=torch.bool)


def example():
    """Ratios 2, 1/2 and 1."""
    train = torch.tensor([[0.8, 0.25, 0.9]]).log()
    rollout = torch.tensor([[0.4, 0.5, 0.9]]).log()
    return train, rollout, ALL


def metrics_of(stages, *tensors):
    found = correct(stages, *tensors).metrics()
    return {name.removeprefix("rollout_corr/"): value for name, value in found.items()}


def by_hand(train, rollout, mask):
    """Every unweighted metric of a batch whose rows all have tokens, straight from its formula."""
    t, r = train.double(), rollout.double()
    lr = (t - r)[mask]
    ratio = lr.exp()
    rows = [(a[m], b[m]) for a, b, m in zip(t, r, mask, strict=True)]
    ppl_t = torch.stack([(-a.mean()).exp() for a, _ in rows])
    ppl_r = torch.stack([(-b.mean()).exp() for _, b in rows])
    apart = ppl_t.log() - ppl_r.log()
    sequence = torch.stack([(a - b).sum().exp() for a, b in rows])
    p, q = t[mask].exp(), r[mask].exp()
    found = {
        "kl": -lr.mean(),
        "k3_kl": (ratio - 1 - lr).mean(),
        "chi2_token": ratio.square().mean() - 1,
        "chi2_seq": sequence.square().mean() - 1,
        "token_mult_prob_error": lr.abs().exp().mean(),
        "log_ratio_abs_max": lr.abs().max(),
        "training_ppl": ppl_t.mean(),
        "training_log_ppl": ppl_t.log().mean(),
        "rollout_ppl": ppl_r.mean(),
        "rollout_log_ppl": ppl_r.log().mean(),
        "log_ppl_diff": apart.mean(),
        "log_ppl_abs_diff": apart.abs().mean(),
        "log_ppl_diff_max": apart.max(),
        "log_ppl_diff_min": apart.min(),
        "ppl_ratio": apart.exp().mean(),
        "rollout_is_raw_mean": ratio.mean(),
        "rollout_is_raw_std": ratio.std(correction=0),
        "rollout_is_raw_max": ratio.max(),
        "rollout_is_raw_min": ratio.min(),
        "rollout_is_raw_eff_sample_size": ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()),
        "training/rollout_probs_diff_max": (p - q).abs().max(),
        "training/rollout_probs_diff_mean": (p - q).abs().mean(),
        "training/rollout_probs_diff_std": (p - q).abs().std(correction=0),
        "training/rollout_actor_probs_pearson_corr": torch.corrcoef(torch.stack([p, q]))[0, 1],
    }
    return {name: value.item() for name, value in found.items()}


@given(seed=st.integers(0, 2**32), mismatch=st.sampled_from([0.01, 0.3, 2.0]))
@settings(deadline=None, max_examples=40)
def test_the_mismatch_is_measured_as_defined(make_batch, seed, mismatch):
    b = make_batch(seed, rows=5, tokens=9, mismatch=mismatch)
    b.mask[:, :2] = True
    got = metrics_of([], b.old, b.rollout, b.mask)
    expected = by_hand(b.old, b.rollout, b.mask)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_the_weights_of_tis_are_reported_raw_and_truncated_side_by_side():
    got = metrics_of([TIS(cap=1.5)], *example())
    w = torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64)
    expected = {
        "rollout_is_mean": 1.0,
        "rollout_is_std": w.std(correction=0).item(),
        "rollout_is_max": 1.5,
        "rollout_is_min": 0.5,
        "rollout_is_eff_sample_size": 9 / (3 * 3.5),
        "rollout_is_raw_mean": 3.5 / 3,
        "rollout_is_raw_max": 2.0,
        "rollout_is_raw_min": 0.5,
        "rollout_is_ratio_fraction_high": 1 / 3,
        "rollout_is_ratio_fraction_low": 1 / 3,  # 1/2 is below 1 / 1.5
        "rollout_rs_masked_fraction": 0.0,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_weights_are_described_over_kept_tokens_and_rejected_ones_counted():
    got = metrics_of([MIS(low=0.6, high=3)], *example())
    assert got["rollout_is_mean"] == pytest.approx(1.5)
    assert got["rollout_is_min"] == pytest.approx(1.0)
    assert got["rollout_rs_masked_fraction"] == pytest.approx(1 / 3)
    assert got["rollout_rs_seq_masked_fraction"] == 1.0
    zeroed = metrics_of([IcePop(low=0.6, high=3)], *example())  # stays, weighing 0
    assert zeroed["rollout_is_mean"] == pytest.approx(1.0)
    assert zeroed["rollout_is_min"] == 0
    assert zeroed["rollout_rs_masked_fraction"] == 0


def test_each_criterion_reports_what_it_alone_rejects():
    stages = [
        Reject(divergence="k3", level="token", high=0.2),  # k3 of 2 is 0.307, of 1/2 0.193
        Reject(level="seq_max", low=0.1, high=1.9),
    ]
    got = metrics_of(stages, *example())
    assert got["rollout_rs_token_k3_masked_fraction"] == pytest.approx(1 / 3)
    assert got["rollout_rs_seq_max_k1_masked_fraction"] == 1.0
    assert got["rollout_rs_seq_max_k1_seq_masked_fraction"] == 1.0
    assert got["rollout_rs_masked_fraction"] == 1.0
    assert "rollout_is_mean" not in got  # of no token there is no weight


def test_at_sequence_level_the_raw_ratio_is_the_sequence_s():
    got = metrics_of([TIS(level="sequence", cap=5)], *example())
    assert got["rollout_is_raw_mean"] == got["rollout_is_raw_max"] == pytest.approx(1.0)
    assert got["chi2_token"] == pytest.approx(5.25 / 3 - 1)  # of tokens, whatever the level


def test_over_the_whole_distribution_both_estimators_are_the_kl_divergence():
    g = torch.Generator().manual_seed(0)
    q = torch.rand(50, generator=g, dtype=torch.float64).softmax(0)  # rollout
    p = torch.rand(50, generator=g, dtype=torch.float64).mul(2).softmax(0)  # train
    counts = (q * 2e5).round().long()
    q = counts / counts.sum()
    kl = (q * (q / p).log()).sum().item()
    tokens = torch.arange(50).repeat_interleave(counts)[None]
    got = metrics_of([], p.log()[tokens], q.log()[tokens], torch.ones_like(tokens).bool())
    assert got["kl"] == pytest.approx(kl, rel=1e-6)
    assert got["k3_kl"] == pytest.approx(kl, rel=1e-6)
    assert got["rollout_is_raw_mean"] == pytest.approx(1)


def test_equal_policies_have_no_mismatch_to_the_last_bit():
    train = -torch.rand(3, 5)
    got = metrics_of([TIS()], train, train.clone(), torch.ones(3, 5, dtype=torch.bool))
    zero = ("kl", "k3_kl", "log_ratio_abs_max", "rollout_is_raw_std", "chi2_token", "chi2_seq")
    one = ("token_mult_prob_error", "rollout_is_raw_eff_sample_size", "rollout_is_mean")
    assert [got[name] for name in zero] == [0] * len(zero)
    assert [got[name] for name in one] == [1] * len(one)
    assert got["training_ppl"] == got["rollout_ppl"]


@given(
    values=st.lists(st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0)), min_size=1, max_size=8),
)
@settings(deadline=None)
def test_whatever_the_log_probs_every_metric_is_finite_and_within_its_bounds(values):
    train, rollout = torch.tensor(values).T.reshape(2, 1, -1)
    for stages in ([], [TIS()], [MIS(level="sequence")], [IcePop(level="geometric")]):
        got = metrics_of(stages, train, rollout, torch.ones_like(train, dtype=torch.bool))
        assert all(math.isfinite(value) for value in got.values()), got
        assert got["k3_kl"] >= 0
        assert 0 < got["rollout_is_raw_eff_sample_size"] <= 1
        assert 0 <= got.get("rollout_is_eff_sample_size", 0) <= 1


def test_one_token_among_a_hundred_thousand_masked_ones_is_measured_as_if_it_were_alone():
    rollout, mask = torch.full((1, 131072), -1.0), torch.zeros(1, 131072, dtype=torch.bool)
    train = rollout + 0.0123
    mask[0, 77] = True
    alone = metrics_of([TIS()], train[:, :1], rollout[:, :1], ALL[:, :1])
    assert metrics_of([TIS()], train, rollout, mask) == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_small_k3_is_not_lost_in_rounding():
    lr = torch.linspace(-1e-4, 1e-4, 10_000, dtype=torch.float64)[None]
    rollout = torch.full_like(lr, -0.1)
    got = metrics_of([], rollout + lr, rollout, torch.ones_like(lr, dtype=torch.bool))
    assert got["k3_kl"] == pytest.approx((lr.exp() - 1 - lr).mean().item(), rel=1e-3)
    assert got["rollout_is_raw_std"] == pytest.approx(lr.exp().std(correction=0).item(), rel=1e-6)


def test_no_token_has_no_metrics():
    train, rollout, mask = example()
    with pytest.raises(MaskError, match="selects no token"):
        correct([TIS()], train, rollout, ~mask).metrics()
    assert group_metrics(by_position(mask, [2]), train, rollout, ~mask) == {}


def test_statistics_of_unusable_log_probs_give_no_metrics_but_an_error_that_names_them():
    train, rollout, mask = example()
    good = correct([], train, rollout, mask).statistics
    bad = good.replaced({"unusable_rollout": torch.tensor(1.0)}, {})  # as CUDA would count it
    with pytest.raises(LogProbError, match=r"^rollout_logprobs: .*NaN, infinite or positive"):
        correction_metrics([], good + bad)


def test_positions_count_the_unmasked_tokens_of_a_sequence():
    mask = torch.tensor([[False, True, True, True], [True, False, True, False]])
    groups = by_position(mask, [1, 2])
    assert groups.labels == ("position_0_0", "position_1_1", "position_2_")
    assert groups.index[mask].tolist() == [0, 1, 2, 0, 1]
    flat, bounds = torch.cat([mask[0, 1:], mask[1]]), torch.tensor([0, 3, 7])
    packed = by_position(flat, [1, 2], cu_seqlens=bounds)
    assert packed.index[flat].tolist() == [0, 1, 2, 0, 1]


def test_groups_of_tokens_have_the_metrics_of_their_tokens_alone(make_batch):
    b = make_batch(0, rows=6, tokens=12)
    ages = torch.randint(0, 5, b.mask.shape, generator=torch.Generator().manual_seed(0))
    got = group_metrics(by_age(ages, 3), b.old, b.rollout, b.mask)
    for label, where in [("age_0", ages == 0), ("age_2", ages == 2), ("age_3_", ages >= 3)]:
        alone = metrics_of([], b.old, b.rollout, b.mask & where)
        assert got[f"rollout_corr/tokens_{label}"] == (b.mask & where).sum()
        for name, of in (("kl", "kl"), ("k3_kl", "k3_kl")):
            assert got[f"rollout_corr/{name}_{label}"] == pytest.approx(alone[of], abs=1e-6)
        size = alone["rollout_is_raw_eff_sample_size"]
        assert got[f"rollout_corr/eff_sample_size_{label}"] == pytest.approx(size, abs=1e-6)


def test_bad_edges_and_ages_are_refused():
    for edges in ([0, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match="positive ascending"):
            by_position(ALL, edges)
    with pytest.raises(ValueError, match="oldest: -1"):
        by_age(torch.zeros(1, 3, dtype=torch.int64), -1)
