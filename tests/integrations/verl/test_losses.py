"""Our losses, called as veRL calls them: equal to veRL's where it is right, else by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from fp8rl.correction import CISPO, GSPO, Counts, PPOClip, Reinforce, correct, policy_loss
from fp8rl.integrations.verl.correction import stages_of
from fp8rl.integrations.verl.losses import BypassRejectionError
from tests.integrations.verl.own import actor, batch, own_helper

OURS_TO_OWN = {"fp8rl_ppo_clip": "vanilla", "fp8rl_gspo": "gspo", "fp8rl_cispo": "cispo"}
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
EVERYTHING = {"rollout_is": "token", "rollout_rs": "token_k2", "rollout_rs_threshold": 0.05}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """One batch as veRL gives it to a loss; log_prob has a gradient."""
    log_prob, old, mask = batch(seed, apart=0.25)
    generator = torch.Generator().manual_seed(seed)
    return {
        "old_log_prob": old,
        "log_prob": log_prob.clone().requires_grad_(),
        "advantages": torch.randn(old.shape, generator=generator),
        "response_mask": mask.bool(),
    }


def called(name: str, config: Any, aggregation: str, **given: Any) -> tuple[Tensor, Tensor, Any]:
    """Loss, gradient and metrics through veRL's registry."""
    given["log_prob"] = given["log_prob"].detach().clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(**given, loss_agg_mode=aggregation, config=config)
    loss.backward()
    return loss.detach(), given["log_prob"].grad, metrics


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ours", OURS_TO_OWN)
@pytest.mark.parametrize(
    "given", [{}, {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 16}]
)
def test_loss_and_gradient_are_veRLs(ours: str, aggregation: str, given: dict[str, int]) -> None:
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.2, clip_ratio_c=1.5)
    config.global_batch_info.update(given)
    data = tensors()
    weights = torch.rand(data["old_log_prob"].shape)
    found = called(ours, config, aggregation, **data, rollout_is_weights=weights)
    own = called(OURS_TO_OWN[ours], config, aggregation, **data, rollout_is_weights=weights)
    torch.testing.assert_close(found[:2], own[:2])
    for name in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"):
        if ours == "fp8rl_ppo_clip":
            assert found[2][name] == pytest.approx(own[2][name], abs=1e-6), name


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fp8rl_ppo_clip", PPOClip(clip_low=0.1, clip_high=0.3, dual_clip=3.0)),
        ("fp8rl_gspo", GSPO(clip_low=0.1, clip_high=0.3, aggregation="token-mean")),
        ("fp8rl_cispo", CISPO(clip_low=0.1, clip_high=0.3)),
        ("fp8rl_reinforce", Reinforce()),
    ],
)
def test_loss_and_gradient_are_ours(name: str, config: Any) -> None:
    data = tensors()
    weights = torch.rand(data["old_log_prob"].shape)
    found = called(
        name,
        actor(clip_ratio_low=0.1, clip_ratio_high=0.3),
        "token-mean",
        **data,
        rollout_is_weights=weights,
    )
    log_prob, kept = data["log_prob"], data["response_mask"]
    out = policy_loss(config, log_prob, data["old_log_prob"], data["advantages"], weights, kept)
    out.loss.backward()
    torch.testing.assert_close(found[:2], (out.loss.detach(), log_prob.grad))
    expected = {n: float(value) for n, value in out.metrics.items() if not n.endswith("_max")}
    assert found[2] == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", [*AGGREGATIONS, "seq-mean-token-sum-norm"])
def test_micro_batches_and_ranks_add_up(aggregation: str) -> None:
    config, data = actor(loss_scale_factor=9), tensors()
    whole, gradient, _ = called("fp8rl_ppo_clip", config, aggregation, **data)
    kept = data["response_mask"]
    config.global_batch_info.update(
        dp_size=2, batch_num_tokens=int(kept.sum()), global_batch_size=len(kept)
    )
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: tensor[rows] for name, tensor in data.items()}
        parts.append(called("fp8rl_ppo_clip", config, aggregation, **part))
    torch.testing.assert_close(sum(loss for loss, _, _ in parts) / 2, whole)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]) / 2, gradient)


def test_metrics_are_means_over_the_micro_batch() -> None:
    config, data = actor(clip_ratio_low=0.05, clip_ratio_high=0.05), tensors()
    alone = called("fp8rl_ppo_clip", config, "token-mean", **data)[2]
    config.global_batch_info.update(dp_size=2, batch_num_tokens=1000, global_batch_size=99)
    assert called("fp8rl_ppo_clip", config, "token-mean", **data)[2] == pytest.approx(alone)


def test_a_micro_batch_with_nothing_left_is_zero() -> None:
    config, data = actor(), tensors()
    config.global_batch_info.update(dp_size=1, batch_num_tokens=50, global_batch_size=6)
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    loss, gradient, _ = called("fp8rl_ppo_clip", config, "token-mean", **data)
    assert loss == 0 and not gradient.any()


def test_through_veRLs_own_ppo_loss() -> None:
    """Decoupled: the weights come as `rollout_is_weights`; veRL selects the fields."""
    data = tensors()
    mask = data["response_mask"]
    rows, tokens = mask.shape
    weights = torch.rand(rows, tokens)
    prompt = 2
    fields = {
        "prompts": torch.ones(rows, prompt, dtype=torch.long),
        "responses": torch.ones(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, prompt + tokens, dtype=torch.long),
        "response_mask": mask.long(),
        "old_log_probs": data["old_log_prob"],
        "advantages": data["advantages"],
        "rollout_log_probs": torch.full((rows, tokens), torch.nan),  # nobody looks at them
        "rollout_is_weights": weights,
    }
    batch_ = TensorDict(fields, batch_size=rows)
    counts = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": rows}
    for name, value in counts.items():
        batch_[name] = NonTensorData(value)
    # the model's output is packed, and its value at a position predicts the next token
    packed = torch.zeros(rows, prompt + tokens)
    packed[:, prompt - 1 : -1] = data["log_prob"].detach()
    config = actor(policy_loss=PolicyLossConfig(loss_mode="fp8rl_ppo_clip"))
    loss, metrics = ppo_loss(config, {"log_probs": packed.flatten()}, batch_)
    expected = policy_loss(
        PPOClip(clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        data["log_prob"], data["old_log_prob"], data["advantages"], weights, mask,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.loss.detach())
    assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(
        float(expected.metrics["actor/pg_clipfrac"])
    )


def bypass_actor(**correction: Any) -> Any:
    return actor(
        policy_loss=PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=correction)
    )


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_without_rejection_is_veRLs(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bypass_actor(rollout_is="sequence", loss_type=loss_type)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=90, global_batch_size=16)
    data = tensors()
    found = called("bypass_mode", config, "token-mean", **data)
    place = "compute_rollout_correction_and_rejection_mask"
    monkeypatch.setattr(rollout_corr_helper, place, getattr(own_helper(), place))
    monkeypatch.setitem(
        core_algos.POLICY_LOSS_REGISTRY, "bypass_mode", core_algos.compute_policy_loss_bypass_mode
    )
    own = called("bypass_mode", config, "token-mean", **data)
    torch.testing.assert_close(found[:2], own[:2])
    assert found[2]["rollout_corr/kl"] == pytest.approx(own[2]["rollout_corr/kl"])


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_divides_by_what_it_kept_where_veRL_counts_what_it_rejected(loss_type: str) -> None:
    config, data = bypass_actor(**EVERYTHING, loss_type=loss_type), tensors()
    mask = data["response_mask"]
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=len(mask)
    )
    loss = called("bypass_mode", config, "token-mean", **data)[0]
    stages = stages_of("token", rollout_rs="token_k2", rollout_rs_threshold=0.05)
    log_prob, rollout = data["log_prob"].detach(), data["old_log_prob"]
    found = correct(stages, log_prob, rollout, mask)
    assert 0 < found.kept.sum() < mask.sum()
    reinforce = loss_type == "reinforce"
    kind = Reinforce() if reinforce else PPOClip(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    weights = found.weights if reinforce else torch.ones_like(log_prob)
    arguments = (kind, log_prob, rollout, data["advantages"], weights, found.kept)
    torch.testing.assert_close(loss, policy_loss(*arguments).loss)
    counts = Counts(float(mask.sum()), float(len(mask)))  # veRL's
    own = core_algos.compute_policy_loss_bypass_mode(
        **data, loss_agg_mode="token-mean", config=config
    )[0]
    torch.testing.assert_close(own.detach(), policy_loss(*arguments, counts=counts).loss)


def test_bypass_takes_a_micro_batch_of_padding() -> None:
    config, data = bypass_actor(rollout_is="token"), tensors()
    config.global_batch_info.update(dp_size=1, batch_num_tokens=50, global_batch_size=6)
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    loss, gradient, _ = called("bypass_mode", config, "token-mean", **data)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("tokens", [0, 1, None], ids=["padding", "one token", "whole"])
@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_metrics_of_bypass_aggregate_over_ranks_whatever_their_micro_batches_hold(
    loss_type: str, tokens: int | None
) -> None:
    """As veRL's engine does: a list of each rank's micro-batches by name, then over ranks."""
    config = bypass_actor(rollout_is="token", loss_type=loss_type)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=90, global_batch_size=24)
    ranks: list[dict[str, Metric]] = [{}, {}]
    for place in range(4):
        data = tensors(place)
        if place == 3 and tokens is not None:
            mask = torch.zeros_like(data["response_mask"])
            mask.flatten()[:tokens] = True
            data["response_mask"] = mask
        found = called("bypass_mode", config, "token-mean", **data)[2]
        for name, metric in Metric.from_dict(found, AggregationType.MEAN).items():
            ranks[place // 2].setdefault(name, metric.init_list()).append(metric)
    assert set(ranks[0]) == set(ranks[1]) >= {"rollout_corr/kl", "rollout_corr/rollout_is_mean"}
    for name in ranks[0]:
        assert math.isfinite(Metric.aggregate_dp([rank[name] for rank in ranks])), name


def test_what_veRL_averages_is_no_maximum() -> None:
    found = called("fp8rl_ppo_clip", actor(), "token-mean", **tensors())[2]
    assert "policy/ratio_mean" in found and not [n for n in found if n.endswith("_max")]


@pytest.mark.parametrize("given", [{"dp_size": 2}, {"batch_num_tokens": 1000}])
@pytest.mark.parametrize(
    "correction", [EVERYTHING, {"rollout_is": "token", "rollout_is_batch_normalize": True}]
)
def test_bypass_refuses_what_it_cannot_count(
    given: dict[str, int], correction: dict[str, Any]
) -> None:
    config = bypass_actor(**correction)
    config.global_batch_info.update(given)
    with pytest.raises(BypassRejectionError, match="bypass_mode=false"):
        called("bypass_mode", config, "token-mean", **tensors())


@pytest.mark.parametrize(
    ("aggregation", "told"),
    [
        ("token-sum", "actor.loss_agg_mode is token-sum"),
        ("seq-mean-token-sum-norm", "actor.loss_scale_factor"),
    ],
)
def test_aggregations_that_are_not_ours_are_refused(aggregation: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        called("fp8rl_ppo_clip", actor(), aggregation, **tensors())
