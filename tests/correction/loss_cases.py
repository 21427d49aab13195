"""Every loss with every aggregation, and what it has to give, written as a loop over tokens."""

import math
from typing import Any, get_args

import torch
from torch import Tensor

from fp8rl.correction import CISPO, GSPO, PPOClip, Reinforce
from fp8rl.correction.losses_config import Aggregation

MAX_TOKENS = 11
KINDS = {
    "ppo_clip": lambda **kw: PPOClip(**kw),
    "dual_clip": lambda **kw: PPOClip(dual_clip=1.5, **kw),
    "gspo": lambda **kw: GSPO(clip_low=0.05, clip_high=0.04, **kw),
    "cispo": lambda **kw: CISPO(clip_low=0.15, clip_high=0.1, **kw),
    "reinforce": lambda **kw: Reinforce(**kw),
}


def make(kind: str, aggregation: str) -> Any:
    """The loss record of that kind and aggregation; bounds that a ratio near 1 does meet."""
    norm = {"max_tokens": MAX_TOKENS} if aggregation.endswith("norm") else {}
    return KINDS[kind](aggregation=aggregation, **norm)


LOSSES = [make(kind, how) for kind in KINDS for how in get_args(Aggregation)]


def name(config: Any) -> str:
    dual = "-dual" if getattr(config, "dual_clip", None) else ""
    return f"{config.kind}{dual}-{config.aggregation}"


def plain_loop(
    config: Any, new: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, kept: Tensor
) -> tuple[float, Tensor]:
    """Loss and its gradient by `new`, in Python floats, one token at a time; all [B, T]."""
    tokens = int(kept.sum())
    sequences = sum(bool(row.any()) for row in kept)
    loss, gradient = 0.0, torch.zeros(kept.shape, dtype=torch.float64)
    for i, row in enumerate(kept):
        places = [t for t, k in enumerate(row.tolist()) if k]
        lr = {t: float(new[i, t]) - float(old[i, t]) for t in places}
        for t in places:
            mean = sum(lr.values()) / len(places)
            ratio = math.exp(mean if config.kind == "gspo" else lr[t])
            value, slope = token(config, ratio, float(new[i, t]), float(advantages[i, t]))
            share = (
                -float(weights[i, t])
                / {
                    "token-mean": tokens,
                    "seq-mean-token-mean": len(places) * sequences,
                    "seq-mean-token-sum": sequences,
                    "seq-mean-token-sum-norm": sequences * MAX_TOKENS,
                }[config.aggregation]
            )
            loss += share * value
            gradient[i, t] = share * slope
    return loss, gradient


def token(config: Any, ratio: float, logprob: float, advantage: float) -> tuple[float, float]:
    """A token's objective and its derivative by the token's log-prob."""
    if config.kind == "reinforce":
        return logprob * advantage, advantage
    bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    if config.kind == "cispo":
        return bounded * logprob * advantage, bounded * advantage
    value, slope = ratio * advantage, ratio * advantage
    if bounded * advantage < value:
        value, slope = bounded * advantage, 0.0
    dual = getattr(config, "dual_clip", None)
    if dual is not None and advantage < 0 and dual * advantage > value:
        value, slope = dual * advantage, 0.0
    return value, slope


def packed(lengths: list[int], *padded: Tensor) -> tuple[Tensor, list[Tensor]]:
    """cu_seqlens, and the first lengths[i] tokens of each row i laid one after the other."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    flat = [torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]) for x in padded]
    return bounds, flat
