"""veRL's settings give veRL's weights, masks and metrics, and others exactly where it is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import rollout_corr_helper as helper

from fp8rl.correction import PRESETS, TIS, BatchNormalize, IcePop, LogProbError, Reject
from fp8rl.integrations.verl.correction import rollout_correction, stages_of
from fp8rl.integrations.verl.losses import CORRECTION_KEYS
from tests.integrations.verl.own import batch, own_helper

OWN = own_helper().compute_rollout_correction_and_rejection_mask

# bounds that are their own reciprocal mean the same of r and of 1 / r
SETTINGS = [
    {},
    {"rollout_is": "token"},
    {"rollout_is": "sequence", "rollout_is_threshold": 1.5},
    {"rollout_is": "token", "rollout_is_threshold": "0.5_1.2"},
    {"rollout_is": "sequence", "rollout_is_threshold": "0.5_5.0"},
    {"rollout_is": "token", "rollout_is_batch_normalize": True},
    {"rollout_is": "sequence", "rollout_is_batch_normalize": True},
    {"rollout_rs": "token_k1", "rollout_rs_threshold": 1.2},
    {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"},
    {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": 1.1},
    {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.05},
    {"rollout_rs": "seq_sum_k2", "rollout_rs_threshold": "0.2"},
    {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.04},
    {"rollout_rs": "seq_max_k3,token_k3", "rollout_rs_threshold": "0.2,0.1"},
    {"rollout_is": "token", "rollout_rs": "seq_max_k2, token_k2", "rollout_rs_threshold": 0.1},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_weights_and_masks_are_veRLs(keys: dict[str, object]) -> None:
    train, rollout, mask = batch()
    weights, kept, _ = rollout_correction(train, rollout, mask, **keys)
    own_weights, own_kept, _ = OWN(train, rollout, mask, **keys)
    assert torch.equal(kept, own_kept) and kept.dtype == mask.dtype
    assert (weights is None) == (own_weights is None)
    if weights is not None:
        name = "rollout_is_weights"
        torch.testing.assert_close(weights.batch[name] * kept, own_weights.batch[name] * kept)


@given(st.integers(0, 2**31), st.sampled_from(SETTINGS))
@settings(max_examples=40, deadline=None)
def test_whatever_the_batch(seed: int, keys: dict[str, object]) -> None:
    train, rollout, mask = batch(seed, rows=4, tokens=7, apart=0.5)
    _, kept, _ = rollout_correction(train, rollout, mask, **keys)
    assert torch.equal(kept, OWN(train, rollout, mask, **keys)[1])


def test_metrics_are_veRLs() -> None:
    train, rollout, mask = batch()
    metrics = rollout_correction(train, rollout, mask, "token", 1.2)[2]
    own = OWN(train, rollout, mask, "token", 1.2)[2]
    shared = set(metrics) & set(own)
    assert {name.removeprefix("rollout_corr/") for name in shared} >= {
        "kl", "k3_kl", "chi2_token", "chi2_seq", "training_ppl", "rollout_ppl", "ppl_ratio",
        "log_ppl_diff", "rollout_is_mean", "rollout_is_max", "rollout_is_min", "rollout_is_std",
        "rollout_is_eff_sample_size", "rollout_is_ratio_fraction_high",
    }  # fmt: skip
    for name in shared:
        assert metrics[name] == pytest.approx(own[name], rel=1e-4, abs=1e-6), name


WEIGHTS_OF_SEQUENCES = {
    f"rollout_is_seq_{name}"
    for name in ("mean", "std", "max", "min", "max_deviation", "fraction_high", "fraction_low")
}
OF_A_CRITERION = (
    "mean", "max", "min", "std", "fraction_high", "fraction_low", "seq_mean", "seq_std",
    "seq_max", "seq_min", "seq_max_deviation", "seq_fraction_high",
)  # fmt: skip


def only_veRLs(
    rollout_is: str | None = None,
    rollout_is_threshold: object = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str = "",
    **_: object,
) -> set[str]:
    """The metrics that are said to be missing."""
    names: set[str] = set()
    if rollout_is is not None:
        names |= WEIGHTS_OF_SEQUENCES
        if "_" in str(rollout_is_threshold):
            names.add("rollout_is_oob_ratio")
        if rollout_is_batch_normalize:
            names.add("rollout_is_batch_norm_factor")
    for criterion in filter(None, (text.strip() for text in rollout_rs.split(","))):
        names |= {f"rollout_rs_{criterion}_{name}" for name in OF_A_CRITERION}
        if criterion.endswith("k1"):
            names.add(f"rollout_rs_{criterion}_seq_fraction_low")
    return {f"rollout_corr/{name}" for name in names}


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_of_veRLs_metrics_none_is_missing_but_those_that_are_said_to_be(
    keys: dict[str, object],
) -> None:
    train, rollout, mask = batch()
    ours, own = (found(train, rollout, mask, **keys)[2] for found in (rollout_correction, OWN))
    assert set(own) - set(ours) == only_veRLs(**keys)


@pytest.mark.parametrize(
    ("level", "normalize", "apart"),
    [
        ("token", False, ""),
        ("token", True, "mean max min std"),
        ("sequence", False, "ratio_fraction_high ratio_fraction_low max"),
        ("sequence", True, "ratio_fraction_high ratio_fraction_low mean max min std"),
    ],
)
def test_metrics_of_the_same_name_are_the_same_but_those_that_are_said_not_to_be(
    level: str, normalize: bool, apart: str
) -> None:
    said = {f"rollout_corr/rollout_is_{name}" for name in apart.split()}
    found: set[str] = set()
    for seed in range(8):
        train, rollout, mask = batch(seed)
        ours = rollout_correction(train, rollout, mask, level, 1.2, normalize)[2]
        own = OWN(train, rollout, mask, level, 1.2, normalize)[2]
        found |= {
            name
            for name in set(ours) & set(own)
            if ours[name] != pytest.approx(own[name], rel=1e-3, abs=1e-5)
        }
    assert found == said


def test_bounds_of_k1_are_of_the_ratio_where_veRLs_are_of_its_reciprocal() -> None:
    rollout, mask = torch.full((1, 2), -3.0), torch.ones(1, 2, dtype=torch.long)
    train = rollout + torch.tensor([[math.log(1.5), math.log(0.7)]])
    keys = {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.6_1.2"}
    assert rollout_correction(train, rollout, mask, **keys)[1].tolist() == [[0, 1]]
    assert OWN(train, rollout, mask, **keys)[1].tolist() == [[1, 0]]


def test_nan_at_padding_changes_nothing_where_it_poisons_veRLs() -> None:
    train, rollout, mask = batch()
    clean = rollout_correction(train, rollout, mask, "token")
    train = torch.where(mask.bool(), train, math.nan)
    weights, kept, metrics = rollout_correction(train, rollout, mask, "token")
    assert torch.equal(weights.batch["rollout_is_weights"], clean[0].batch["rollout_is_weights"])
    assert torch.equal(kept, clean[1]) and metrics == clean[2]
    assert OWN(train, rollout, mask, "token")[0].batch["rollout_is_weights"].isnan().any()


def test_effective_sample_size_is_at_most_1_where_veRLs_is_not() -> None:
    rollout = torch.full((2, 4), -1.0)
    train, mask = rollout - 18, torch.ones(2, 4, dtype=torch.long)
    name = "rollout_corr/rollout_is_eff_sample_size"
    assert 0 <= rollout_correction(train, rollout, mask, "token")[2][name] <= 1
    assert OWN(train, rollout, mask, "token")[2][name] > 1.5


def test_k3_is_finite_where_veRLs_overflows() -> None:
    train, mask = torch.full((1, 2), -0.1), torch.ones(1, 2, dtype=torch.long)
    rollout = torch.tensor([[-100.0, -0.2]])
    assert math.isfinite(rollout_correction(train, rollout, mask)[2]["rollout_corr/k3_kl"])
    assert OWN(train, rollout, mask)[2]["rollout_corr/k3_kl"] == math.inf


def test_normalization_leaves_rejected_tokens_out() -> None:
    train, rollout, mask = batch()
    keys = {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.05}
    weights, kept, _ = rollout_correction(train, rollout, mask, "token", 2.0, True, **keys)
    kept_weights = weights.batch["rollout_is_weights"][kept.bool()]
    assert kept_weights.mean().item() == pytest.approx(1)


def test_a_nan_that_counts_is_an_error() -> None:
    train, rollout, mask = batch()
    train[0, 0] = math.nan
    with pytest.raises(LogProbError, match="train_logprobs"):
        rollout_correction(train, rollout, mask, "token")


@pytest.mark.parametrize("config", [RolloutCorrectionConfig.decoupled_geo_rs_seq_tis(), None])
def test_veRLs_trainer_gets_our_weights_in_its_batch(config: object) -> None:
    config = config or OmegaConf.create({"rollout_is": "token", "rollout_is_threshold": 2.0})
    train, rollout, mask = batch(apart=1e-3)
    tensors = {"old_log_probs": train, "rollout_log_probs": rollout, "response_mask": mask}
    data, metrics = helper.compute_rollout_correction_and_add_to_batch(
        DataProto.from_dict(tensors=tensors), config
    )
    keys = {key: config.get(key) for key in CORRECTION_KEYS if config.get(key) is not None}
    weights, kept, _ = rollout_correction(train, rollout, mask, **keys)
    assert torch.equal(data.batch["rollout_is_weights"], weights.batch["rollout_is_weights"])
    assert torch.equal(data.batch["response_mask"], kept)
    assert "rollout_corr/token_mult_prob_error" in metrics  # not one of veRL's own


PRESET_NAMES = [name for name in PRESETS if name not in ("disabled",)]


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_presets_of_the_same_name_are_the_same(name: str) -> None:
    config = getattr(RolloutCorrectionConfig, name)()
    stages = stages_of(**{key: getattr(config, key) for key in CORRECTION_KEYS})
    assert set(stages) == set(PRESETS[name].stages)
    assert config.bypass_mode == (PRESETS[name].mode == "bypass")


def test_what_each_setting_stands_for() -> None:
    assert stages_of("token", "2.0") == (TIS(level="token", cap=2.0),)
    assert stages_of("sequence", "0.5_5.0") == (IcePop(level="sequence", low=0.5, high=5.0),)
    assert stages_of(None, 2.0, True, "token_k1", 4) == (
        Reject(divergence="k1", level="token", low=0.25, high=4.0),
    )
    assert stages_of("token", 3, True)[-1] == BatchNormalize(level="token")
    assert stages_of("token", None) == ()
    # of k2 and k3 a threshold is no ratio
    assert stages_of(None, 2.0, False, "seq_mean_k3", 0.01) == (
        Reject(divergence="k3", level="seq_mean", high=0.01),
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"rollout_is": "geometric"}, "rollout_is='geometric' is not one of token, sequence"),
        ({"rollout_is": "token", "rollout_is_threshold": "a"}, "rollout_is_threshold: 'a'"),
        ({"rollout_is": "token", "rollout_is_threshold": True}, "rollout_is_threshold: True"),
        ({"rollout_is": "token", "rollout_is_threshold": -1}, "expected a positive number"),
        (
            {"rollout_is": "token", "rollout_is_threshold": "2_1"},
            "rollout_is_threshold: '2_1'; the",
        ),
        ({"rollout_is": "token", "rollout_is_threshold": "nan"}, "rollout_is_threshold: 'nan'"),
        ({"rollout_is": "token", "rollout_is_threshold": "inf"}, "rollout_is_threshold: 'inf'"),
        ({"rollout_is": "token", "rollout_is_threshold": 0.55}, "with a point, as 0.5_5.0"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 0.55}, "with a point, as 0.5_5.0"),
        (
            {"rollout_rs": "token_k1", "rollout_rs_threshold": "2.0_0.5"},
            "rollout_rs_threshold of token_k1: '2.0_0.5'; the",
        ),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "nan"}, "threshold of token_k2: 'nan'"),
        ({"rollout_rs": "", "rollout_rs_threshold": 1.2}, "rollout_rs='' names no criterion"),
        ({"rollout_rs": " , ", "rollout_rs_threshold": 1.2}, "names no criterion"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 1}, "'seq_max_k1' is not one of"),
        ({"rollout_rs": "token_k2"}, "needs rollout_rs_threshold"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}, "an upper bound only"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1,2"}, "2 thresholds for 1 criteria"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_its_key(keys: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        stages_of(**keys)
