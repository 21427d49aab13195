"""Learning from a batch, on the real trainer: however it is cut, the step is that of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.correction import PPOClip, correct, group_advantages, policy_loss
from fp8rl.rollout_batch import RolloutBatch
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.learning import learn
from fp8rl.trainer.megatron import MegatronTrainer

VOCAB, ROWS, TIME, GROUP = 64, 16, 12, 4
LOSSES: list[dict[str, Any]] = [
    {"preset": "grpo"},
    {"preset": "dapo"},
    {"preset": "gspo"},
    {"preset": "dr_grpo", "max_tokens": 8},
]


def config(correction: dict[str, Any], loss: dict[str, Any], **trainer: Any) -> RunConfig:
    return parse_config(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 128,
                "ffn_hidden_size": 256,
                "init_std": 0.1,
            },
            "trainer": {"minibatches": 1, "micro_batch_size": 16, "grad_clip": 1e9, **trainer},
            "rollout": {"prompts_per_step": ROWS // GROUP, "samples_per_prompt": GROUP},
            "correction": correction,
            "loss": loss,
        }
    )


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with init_distributed(config({}, {})):
        yield


def rollout_of(trainer: MegatronTrainer) -> tuple[RolloutBatch, torch.Tensor]:
    """A batch that a policy near the trainer's has sampled, and its log-probs under the trainer."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (ROWS, TIME), generator=g)
    lengths = torch.randint(6, TIME + 1, (ROWS, 1), generator=g)
    positions = torch.arange(TIME)
    batch = TokenBatch(tokens, (positions >= 4) & (positions < lengths))
    old = trainer.log_probs(batch)
    apart = 0.3 * torch.randn(ROWS, TIME, generator=g)
    behaviour = torch.where(batch.response_mask, (old + apart).clamp(max=-1e-3), 0.0)
    versions = torch.where(batch.response_mask, 3, 0)
    rewards = (torch.rand(ROWS, generator=g) < 0.5).float()
    return RolloutBatch(batch, behaviour, versions, rewards), old


def stepped(chosen: RunConfig) -> tuple[dict[str, Any], torch.Tensor]:
    """One batch learned by a trainer made anew: metrics, and the gradient Adam has seen."""
    torch.manual_seed(0)
    trainer = MegatronTrainer(chosen, VOCAB)
    rollout, old = rollout_of(trainer)
    decoupled = chosen.correction.mode == "decoupled"
    metrics = learn(chosen, trainer, rollout, old if decoupled else None, version=4)
    moments = [t for name, t in trainer.state().items() if name.startswith("adam/exp_avg/")]
    return metrics, torch.cat([moment.flatten() for moment in moments]) * 10


REJECTING = {"kind": "reject", "level": "token", "low": 0.75, "high": 1.3}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["preset"])
@pytest.mark.parametrize("mode", ["decoupled", "bypass"])
def test_micro_batches_change_neither_step_nor_metrics(mode: str, loss: dict[str, Any]) -> None:
    correction = {"mode": mode, "stages": [REJECTING]}
    whole, gradient = stepped(config(correction, loss))
    parts, in_parts = stepped(config(correction, loss, micro_batch_size=3))
    assert 0.05 < whole["rollout_corr/rollout_rs_masked_fraction"] < 0.9, "tokens are rejected"
    assert gradient.norm() > 1e-3
    torch.testing.assert_close(in_parts, gradient, atol=float(gradient.abs().max()) / 50, rtol=0.05)
    exact = [name for name in whole if not name.startswith(("grad_norm", "loss"))]
    assert {n: parts[n] for n in exact} == pytest.approx(
        {n: whole[n] for n in exact}, rel=1e-2, abs=1e-2
    )
    assert parts["loss"] == pytest.approx(whole["loss"], rel=0.02, abs=2e-3)


def test_the_decoupled_step_is_that_of_the_loss_of_the_whole_batch() -> None:
    chosen = config({"stages": [{"kind": "tis", "cap": 1.2}]}, {"preset": "grpo"})
    trainer = MegatronTrainer(chosen, VOCAB)
    rollout, old = rollout_of(trainer)
    mask = rollout.batch.response_mask
    fix = correct(chosen.correction.stages, old, rollout.logprobs, mask)
    advantages = group_advantages(rollout.rewards, GROUP)
    assert isinstance(chosen.loss, PPOClip)
    expected = policy_loss(chosen.loss, old, old, advantages, fix.weights, fix.kept)
    metrics = learn(chosen, trainer, rollout, old, version=4)
    assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=1e-4, abs=1e-6)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
    for name, value in fix.metrics().items():
        assert metrics[name] == pytest.approx(value), name
    assert metrics["rollout_corr/tokens_age_1"] == mask.sum()  # written by version 3, trained as 4
    positions = [metrics[f"rollout_corr/tokens_position_{name}"] for name in ("0_0", "1_3", "4_")]
    assert positions[0] == ROWS and sum(positions) == mask.sum()  # responses of 2 to 8 tokens


def test_bypass_trains_against_the_sampler_and_rejected_tokens_leave_its_denominator() -> None:
    chosen = config({"mode": "bypass", "stages": [REJECTING]}, {"preset": "dapo"})
    trainer = MegatronTrainer(chosen, VOCAB)
    rollout, old = rollout_of(trainer)
    mask = rollout.batch.response_mask
    kept = correct(chosen.correction.stages, old, rollout.logprobs, mask).kept
    advantages = group_advantages(rollout.rewards, GROUP)
    ones = torch.ones_like(old)
    behaviour = rollout.logprobs
    expected = policy_loss(chosen.loss, old, behaviour, advantages, ones, kept)
    counted = policy_loss(chosen.loss, old, behaviour, advantages, ones * kept, mask)
    metrics = learn(chosen, trainer, rollout, None, version=4)
    assert metrics["loss"] == pytest.approx(expected.loss.item(), rel=1e-3)
    assert abs(counted.loss.item() / expected.loss.item() - 1) > 0.05, "counting them would show"
    assert metrics["policy/ratio_mean"] == pytest.approx(
        (old - behaviour)[kept].exp().mean().item(), rel=1e-3
    )


def test_well_mastered_tokens_are_left_out_while_the_policy_is_too_sure() -> None:
    rule = {"probability": 0.02, "entropy": 100.0}  # every policy is below this entropy
    plain, gradient = stepped(config({}, {"preset": "dapo"}))
    metrics, without = stepped(config({}, {"preset": "dapo", "mastered": rule}))
    assert "policy/mastered_fraction" not in plain
    assert 0.02 < metrics["policy/mastered_fraction"] < 0.5
    assert not torch.allclose(without, gradient, rtol=0.1, atol=1e-4)
    quiet, as_before = stepped(config({}, {"preset": "dapo", "mastered": {"entropy": 1e-6}}))
    assert quiet["policy/mastered_fraction"] == 0
    torch.testing.assert_close(as_before, gradient)
