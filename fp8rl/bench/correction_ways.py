"""The ways that `fp8rl bench correction` compares: ours, veRL's own, and plain torch.

A case is one piece of work on the same tensors, done by every way that is installed. veRL's
functions are called as its trainer calls them, without our plugin in their place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fp8rl.correction import (
    TIS,
    PPOClip,
    Reject,
    Stage,
    correct,
    log_probs_from_logits,
    policy_loss,
)

OURS, VERL, TORCH = "fp8rl", "veRL", "torch"
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work: `prepare(way)` gives the call to time, whose result is compared."""

    name: str
    size: str
    prepare: Mapping[str, Callable[[], Call]]
    main_result: Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Log-probs of one batch: two policies 0.02 nats apart, and one that has taken a step."""

    new: Tensor
    old: Tensor
    rollout: Tensor
    advantages: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: int, columns: int, device: torch.device) -> Tokens:
        """Responses of a quarter to all of the columns; fp32."""
        g = torch.Generator().manual_seed(0)
        old = -3 * torch.rand(rows, columns, generator=g)
        rollout, new = (
            (old + 0.02 * torch.randn(rows, columns, generator=g)).clamp(max=0) for _ in range(2)
        )
        lengths = torch.randint(columns // 4, columns + 1, (rows, 1), generator=g)
        mask = torch.arange(columns) < lengths
        advantages = torch.randn(rows, generator=g)
        return cls(*(x.to(device) for x in (new, old, rollout, advantages, mask)))


def has_verl() -> bool:
    """Whether veRL is installed here."""
    return find_spec("verl") is not None


def cases(rows: int, columns: int, vocabulary: int, device: torch.device) -> list[Case]:
    """All cases, on tensors made for them."""
    tokens = Tokens.of(rows, columns, device)
    geometric = Reject(level="seq_mean", low=0.999, high=1.001)
    return [
        _correction("TIS of tokens", [TIS()], {"rollout_is": "token"}, tokens),
        _correction(
            "geometric rejection, TIS of sequences",
            [geometric, TIS(level="sequence")],
            {
                "rollout_is": "sequence",
                "rollout_rs": "seq_mean_k1",
                "rollout_rs_threshold": "0.999_1.001",
            },
            tokens,
        ),
        _loss(tokens),
        _log_probs(2048, vocabulary, device),
    ]


def _correction(
    name: str, stages: list[Stage], verl_settings: dict[str, Any], tokens: Tokens
) -> Case:
    def ours() -> Call:
        def call() -> Tensor:
            fix = correct(stages, tokens.old, tokens.rollout, tokens.mask)
            fix.metrics()
            return fix.weights

        return call

    def verls() -> Call:
        compute = _verl().compute_rollout_correction_and_rejection_mask
        mask = tokens.mask.float()

        def call() -> Tensor:
            weights, kept, _ = compute(tokens.old, tokens.rollout, mask, **verl_settings)
            result: Tensor = weights.batch["rollout_is_weights"] * kept
            return result

        return call

    rows, columns = tokens.mask.shape
    return Case(
        f"correction and metrics: {name}",
        f"{rows} x {columns} tokens",
        {OURS: ours, VERL: verls},
        lambda weights: weights,
    )


def _loss(tokens: Tokens) -> Case:
    weights = torch.ones_like(tokens.old)

    def ours() -> Call:
        new = tokens.new.clone().requires_grad_()
        given = tokens.old, tokens.advantages, weights, tokens.mask

        def call() -> Tensor:
            new.grad = None
            torch.autograd.backward(policy_loss(PPOClip(dual_clip=3.0), new, *given).loss)
            assert new.grad is not None
            return new.grad

        return call

    def verls() -> Call:
        from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
        from verl.workers.config import ActorConfig

        _verl()
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            clip_ratio_low=0.2,
            clip_ratio_high=0.28,
            ppo_micro_batch_size_per_gpu=1,
        )
        new = tokens.new.clone().requires_grad_()
        advantages = tokens.advantages[:, None].expand_as(new).contiguous()

        def call() -> Tensor:
            new.grad = None
            loss, _ = compute_policy_loss_vanilla(
                old_log_prob=tokens.old,
                log_prob=new,
                advantages=advantages,
                response_mask=tokens.mask,
                loss_agg_mode="token-mean",
                config=config,
                rollout_is_weights=weights,
            )
            loss.backward()
            assert new.grad is not None
            return new.grad

        return call

    rows, columns = tokens.mask.shape
    return Case(
        "loss and gradient: PPO, dual clip, token-mean",
        f"{rows} x {columns} tokens",
        {OURS: ours, VERL: verls},
        lambda gradient: gradient,
    )


def _log_probs(count: int, vocabulary: int, device: torch.device) -> Case:
    g = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(count, vocabulary, generator=g)).to(device, torch.bfloat16)
    tokens = torch.randint(0, vocabulary, (count,), generator=g).to(device)
    logits.requires_grad_()

    def ours() -> Call:
        def call() -> Tensor:
            logits.grad = None
            scores = log_probs_from_logits(logits, tokens)
            torch.autograd.backward(scores.logprobs.sum())
            return scores.logprobs.detach()

        return call

    def plain() -> Call:
        def call() -> Tensor:
            logits.grad = None
            wide = torch.log_softmax(logits.float(), dim=-1)
            found = wide.gather(-1, tokens[:, None])[:, 0]
            torch.autograd.backward(found.sum())
            return found.detach()

        return call

    return Case(
        "log-probs from logits, and their gradient",
        f"{count} tokens, {vocabulary} words, bf16",
        {OURS: ours, TORCH: plain},
        lambda logprobs: logprobs,
    )


def _verl() -> Any:
    """veRL's correction helper, as it comes; our plugin would stand in its place."""
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    from verl.trainer.ppo import rollout_corr_helper

    own = rollout_corr_helper.compute_rollout_correction_and_rejection_mask
    assert own.__module__ == rollout_corr_helper.__name__, "a plugin has replaced veRL's"
    return rollout_corr_helper
