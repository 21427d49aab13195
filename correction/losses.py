"""The clipped policy-gradient loss of GRPO and DAPO, corrected, as a mean over kept tokens.

    rho_t = exp(log pi(y_t) - log pi_old(y_t))
    loss  = - sum_t w_t * min(rho_t * A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t) / N

PPO's clip (arXiv 1707.06347) with DAPO's higher upper bound and token mean (arXiv 2503.14476).
Decoupled: pi_old is the trainer's policy when the batch came, and `w` = pi_old / pi_rollout from
`correct` bridges to the engine's; the clip never sees the mismatch. `N` is the number of kept
tokens, so a rejected token is in neither sum. Leaves out: dual clip, KL and entropy terms, other
aggregations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.correction.checks import check_shapes, check_values
from fp8rl.correction.config import PolicyLossConfig
from fp8rl.correction.errors import ShapeError, ValueRangeError
from fp8rl.correction.ratios import bounded_exp, masked


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss to call `backward` on, and what to log.

    Attributes:
        loss: scalar in fp32 or wider, with gradient.
        metrics: name -> scalar tensor without gradient. All were divided by the loss's denominator,
            so over micro-batches they add up as the loss does; `policy/ratio_max` is a maximum.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def policy_loss(
    config: PolicyLossConfig,
    logprobs: Float[Tensor, "batch tokens"],
    old_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch tokens"],
    weights: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    denominator: float | int | Tensor | None = None,
) -> LossOutput:
    """Corrected clipped loss; gradient flows through `logprobs` alone.

    Args:
        config: the clip range.
        logprobs: of the policy being stepped, [batch, tokens], with gradient.
        old_logprobs: of pi_old, the trainer's policy when the batch came, [batch, tokens].
        advantages: [batch] or [batch, tokens].
        weights: `Correction.weights`, [batch, tokens].
        mask: `Correction.kept`, bool [batch, tokens]. If nothing is kept, loss and gradient are 0.
        denominator: number or 0-d tensor to divide by; default: the kept tokens here. With
            micro-batches or data parallelism give the count over all of them and *add* the results
            (DDP averages gradients: multiply the loss by the number of ranks).

    Raises:
        MaskError, ShapeError: the tensors do not fit together.
        LogProbError: an unmasked log-prob is NaN, infinite or positive.
        ValueRangeError: unmasked advantages or weights are not finite, or the denominator is not
            a positive number.
    """
    advantages = _per_token(advantages, mask)
    logs = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    factors = {"advantages": advantages, "weights": weights}
    check_shapes(mask, logs | factors)
    check_values(mask, logprobs=logs, finite=factors)

    ratio = bounded_exp(masked(logprobs, mask) - masked(old_logprobs.detach(), mask))
    advantage = masked(advantages.detach(), mask)
    weight = masked(weights.detach(), mask)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    # min(...) written out: the clip acts only where it lowers the objective
    too_high = (advantage > 0) & (ratio > high)
    too_low = (advantage < 0) & (ratio < low)
    surrogate = ratio.masked_fill(too_high, high).masked_fill(too_low, low)
    total = _denominator(denominator, mask, ratio.dtype)
    loss = -(weight * surrogate * advantage).sum() / total
    seen = torch.where(mask, ratio.detach(), 0.0)
    metrics = {
        "policy/clip_fraction_high": too_high.sum() / total,
        "policy/clip_fraction_low": too_low.sum() / total,
        "policy/ratio_mean": seen.sum() / total,
        "policy/ratio_max": seen.amax(),
    }
    return LossOutput(loss=loss, metrics=metrics)


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """[batch] advantages spread over their rows; [batch, tokens] ones as they are."""
    if advantages.ndim != 1:
        return advantages
    if mask.ndim != 2 or advantages.shape[0] != mask.shape[0]:
        raise ShapeError(
            f"advantages: shape {list(advantages.shape)}, expected [batch] or [batch, tokens] "
            f"of mask's {list(mask.shape)}"
        )
    return advantages[:, None].expand(mask.shape)


def _denominator(given: float | int | Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to divide by, as a 0-d tensor; 1 where nothing is kept, for 0 / 0 is meant to be 0."""
    kept = mask.sum()
    if given is None:
        return kept.clamp(min=1).to(dtype)
    total = torch.as_tensor(given, dtype=dtype, device=mask.device).detach()
    if total.ndim:
        raise ShapeError(f"denominator: shape {list(total.shape)}, expected a number")
    empty = kept == 0
    if not (empty | (torch.isfinite(total) & (total > 0))):
        raise ValueRangeError(
            f"denominator: {total.item()}, expected a positive number: the kept tokens of all "
            "micro-batches and ranks together"
        )
    return torch.where(empty, 1.0, total)
