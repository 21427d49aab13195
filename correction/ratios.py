"""Importance ratios between the policy that learns and the policy that sampled.

    lr_t = log p_train(y_t) - log p_rollout(y_t)          (0 where masked)
    token:      r_t = exp(lr_t)
    sequence:   r_t = exp(sum over the row's unmasked tokens of lr)
    geometric:  r_t = exp(mean over the row's unmasked tokens of lr)

`p_rollout` is the probability the engine sampled with: processed log-probs, after temperature and
top-k. The exponent is clamped to +-20, so a ratio lies in [2.1e-9, 4.9e8] and is always finite.
Masked positions are replaced before any arithmetic, so a NaN there is never read.
Sequence and geometric ratios are those of GSPO (arXiv 2507.18071). Leaves out: packed inputs.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.correction.config import Level

LOG_RATIO_LIMIT = 20.0


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp` of the argument clamped to +-20: finite for every input, and monotone."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 or wider with 0 at masked positions; gradient there is exactly 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, wide, 0.0)  # not x * mask: NaN * 0 is NaN


def log_ratios(
    train_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """Token log-ratios `log p_train - log p_rollout` [batch, tokens], unclamped, 0 where masked."""
    return masked(train_logprobs, mask) - masked(rollout_logprobs, mask)


def importance_ratios(
    log_ratio: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    level: Level,
) -> Float[Tensor, "batch tokens"]:
    """Ratios at `level`, one for each token (a row's tokens share theirs), 1 where masked.

    Args:
        log_ratio: from `log_ratios`, [batch, tokens], 0 where masked.
        mask: bool [batch, tokens].
        level: "token", "sequence" (sum) or "geometric" (mean).
    """
    if level != "token":
        # fp64 sum: huge log-ratios of both signs would overflow to NaN in fp32
        row = log_ratio.sum(dim=1, keepdim=True, dtype=torch.float64)
        if level == "geometric":
            row = row / mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = row.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).to(log_ratio.dtype)
    return torch.where(mask, bounded_exp(log_ratio), 1.0)
