"""Importance ratios between the policy that learns and the policy that sampled.

    lr_t = log p_train(y_t) - log p_rollout(y_t)          (0 where masked)
    token:      r_t = exp(lr_t)
    sequence:   r_t = exp(sum over the sequence's unmasked tokens of lr)
    geometric:  r_t = exp(mean over the sequence's unmasked tokens of lr)

`p_rollout` is the probability the engine sampled with: processed log-probs, after temperature and
top-k. The exponent is clamped to +-20, so a ratio lies in [2.1e-9, 4.9e8] and is always finite.
Masked positions are replaced before any arithmetic, so a NaN there is never read.
Sequence and geometric ratios are those of GSPO (arXiv 2507.18071).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fp8rl.correction.checks import check_shapes, check_values
from fp8rl.correction.layout import Layout, layout_of
from fp8rl.correction.stages import Level

LOG_RATIO_LIMIT = 20.0


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp` of the argument clamped to +-20: finite for every input, and monotone."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 or wider with 0 at masked positions; gradient there is exactly 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, wide, 0.0)  # not x * mask: NaN * 0 is NaN


def sequence_log_ratios(log_ratio: Tensor, layout: Layout) -> Tensor:
    """Sums of log-ratios over sequences, fp64 [batch]: in fp32 huge ones of both signs give NaN."""
    return layout.sum(log_ratio.double())


def mean_of_tokens(sums: Tensor, tokens: Tensor) -> Tensor:
    """A sequence's sum over its tokens as a mean; 0 for a sequence without tokens."""
    return sums / tokens.clamp(min=1)


def checked_log_ratios(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-ratios like mask, unclamped, 0 where masked; and what to add to what comes of them.

    Raises:
        ShapeError, LogProbError: as `check_shapes` and `check_values`, whose result is the second.
    """
    logprobs = {"train_logprobs": train_logprobs, "rollout_logprobs": rollout_logprobs}
    check_shapes(mask, logprobs)
    poison = check_values(mask, logprobs=logprobs)
    return masked(train_logprobs, mask) - masked(rollout_logprobs, mask), poison


@torch.no_grad()
def importance_ratios(
    level: Level,
    train_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> Float[Tensor, "*tokens"]:
    """Raw ratios at `level`, one for each token (a sequence's tokens share theirs), 1 where masked.

    To look at: `correct` never holds them whole. Arguments, shapes and errors are those of
    `correct`.
    """
    layout = layout_of(mask, cu_seqlens)
    log_ratio, poison = checked_log_ratios(train_logprobs, rollout_logprobs, mask)
    if level != "token":
        row = sequence_log_ratios(log_ratio, layout)
        if level == "geometric":
            row = mean_of_tokens(row, layout.sum(mask.double()))
        log_ratio = layout.spread(row)
    return torch.where(mask, bounded_exp(log_ratio) + poison, 1.0).to(torch.float32)
