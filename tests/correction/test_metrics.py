import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import (
    MIS,
    TIS,
    MaskError,
    NoCorrection,
    correct,
    correction_metrics,
    mismatch_metrics,
)


def example():
    train = torch.tensor([[0.8, 0.25, 0.9]]).log()
    rollout = torch.tensor([[0.4, 0.5, 0.9]]).log()  # ratios 2, 0.5, 1
    return train, rollout, torch.ones(1, 3, dtype=torch.bool)


def test_closed_forms():
    got = mismatch_metrics(*example())
    log2 = math.log(2)
    expected = {
        "mismatch/k1": 0.0,
        "mismatch/k3": (1 - log2 + (-0.5 + log2)) / 3,
        "mismatch/exp_abs_diff": (2 + 2 + 1) / 3,
        "mismatch/max_abs_diff": log2,
        "mismatch/ess": 3.5**2 / (3 * 5.25),
        "mismatch/ratio_mean": 3.5 / 3,
        "mismatch/ratio_std": math.sqrt(5.25 / 3 - (3.5 / 3) ** 2),
        "mismatch/ratio_min": 0.5,
        "mismatch/ratio_max": 2.0,
        "mismatch/rollout_ppl": (0.4 * 0.5 * 0.9) ** (-1 / 3),
        "mismatch/train_ppl": (0.8 * 0.25 * 0.9) ** (-1 / 3),
    }
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert set(got) == set(expected)


def test_each_perplexity_is_that_of_its_own_policy():
    train, rollout = torch.full((1, 2), 1 / 4).log(), torch.full((1, 2), 1 / 8).log()
    got = mismatch_metrics(train, rollout, torch.ones(1, 2, dtype=torch.bool))
    assert got["mismatch/train_ppl"] == pytest.approx(4)
    assert got["mismatch/rollout_ppl"] == pytest.approx(8)


def test_masked_tokens_are_in_no_metric(make_batch):
    b = make_batch(0)
    b.rollout = b.old - 0.5 * torch.rand(b.old.shape) - 0.1  # no ratio is as small as a masked 1
    chosen = b.old[b.mask][None], b.rollout[b.mask][None]
    alone = mismatch_metrics(*chosen, torch.ones(chosen[0].shape, dtype=torch.bool))
    assert mismatch_metrics(b.old, b.rollout, b.mask) == pytest.approx(alone)


def test_k1_and_k3_are_in_expectation_the_divergence_of_training_from_rollout():
    rollout = torch.tensor([0.5, 0.25, 0.25])
    train = torch.tensor([0.25, 0.5, 0.25])
    kl = (rollout * (rollout / train).log()).sum().item()
    seen = torch.tensor([0, 0, 1, 2])  # every token as often as the rollout policy samples it
    got = mismatch_metrics(
        train.log()[seen][None], rollout.log()[seen][None], torch.ones(1, 4, dtype=torch.bool)
    )
    assert got["mismatch/k1"] == pytest.approx(kl, rel=1e-6)
    assert got["mismatch/k3"] == pytest.approx(kl, rel=1e-6)
    assert got["mismatch/ratio_mean"] == pytest.approx(1)


def test_equal_policies_have_no_mismatch():
    train, _, mask = example()
    got = mismatch_metrics(train, train, mask)
    assert [got[f"mismatch/{k}"] for k in ("k1", "k3", "max_abs_diff", "ratio_std")] == [0] * 4
    assert [got[f"mismatch/{k}"] for k in ("exp_abs_diff", "ess", "ratio_mean")] == [1] * 3
    assert got["mismatch/train_ppl"] == got["mismatch/rollout_ppl"]


@given(
    pairs=st.lists(
        st.tuples(*[st.floats(-1e4, 0.0, width=32) | st.floats(-(2.0**127), 0.0, width=32)] * 2),
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None, max_examples=300)
def test_metrics_are_finite_k3_is_not_negative_and_ess_lies_in_0_1(pairs):
    train, rollout = torch.tensor(pairs, dtype=torch.float32).T[:, None].unbind(0)
    got = mismatch_metrics(train, rollout, torch.ones_like(train, dtype=torch.bool))
    assert all(math.isfinite(v) for v in got.values())
    assert got["mismatch/k3"] >= 0
    assert 0 < got["mismatch/ess"] <= 1


def test_raw_and_truncated_weights_are_reported_side_by_side():
    train, rollout, mask = example()
    config = TIS(cap=1.5)
    got = correction_metrics(config, correct(config, train, rollout, mask), mask)
    assert got == pytest.approx(
        {
            "correction/truncated_fraction": 1 / 3,
            "correction/rejected_fraction": 0.0,
            "correction/weight_mean": (1.5 + 0.5 + 1) / 3,
            "correction/raw_weight_mean": 3.5 / 3,
        }
    )


def test_rejected_tokens_are_counted_among_the_unmasked_ones():
    train, rollout, mask = example()
    mask[0, 2] = False
    config = MIS(low=0.6, high=3)
    got = correction_metrics(config, correct(config, train, rollout, mask), mask)
    assert got == pytest.approx(
        {
            "correction/truncated_fraction": 0.0,
            "correction/rejected_fraction": 1 / 2,
            "correction/weight_mean": 2 / 2,
            "correction/raw_weight_mean": 2.5 / 2,
        }
    )


def test_without_correction_nothing_is_truncated_and_the_raw_mean_still_shows():
    train, rollout, mask = example()
    config = NoCorrection()
    got = correction_metrics(config, correct(config, train, rollout, mask), mask)
    assert got["correction/truncated_fraction"] == got["correction/rejected_fraction"] == 0
    assert got["correction/weight_mean"] == 1
    assert got["correction/raw_weight_mean"] == pytest.approx(3.5 / 3)


def test_no_token_to_measure_is_an_error():
    train, rollout, mask = example()
    with pytest.raises(MaskError, match="mask: selects no token"):
        mismatch_metrics(train, rollout, ~mask)
    with pytest.raises(MaskError, match="mask: selects no token"):
        correction_metrics(TIS(), correct(TIS(), train, rollout, ~mask), ~mask)
