"""The policy-gradient loss, corrected, as an average over kept tokens.

    loss = aggregate of  - w_t A_t f_t          f and its settings: objectives.py, losses_config.py

    decoupled   `old_logprobs` are the trainer's when the batch came, and `w` = pi_old / pi_rollout
                from `correct` bridges to the engine's: the clip never sees the mismatch
    bypass      `old_logprobs` are the rollout's, and a clipped loss takes weights of ones: its
                ratio pi / pi_rollout is the correction already; reinforce takes the weights of
                `correct` for the policy being stepped

What a batch leaves out is known before its first micro-batch in decoupled mode, and `count` of the
whole batch makes the micro-batches add up. In bypass mode rejection is known only at each
micro-batch: take sums with `counts=Counts(1, 1)`, add up `LossOutput.counts`, and divide the
gradient by their `divisor` before the optimizer's step.
Leaves out: KL to a reference policy, entropy bonus; mastered tokens, which `drop_mastered` takes
out of `kept` before anything is counted.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fp8rl.correction.aggregation import Counts, aggregate, counts_of, usable
from fp8rl.correction.checks import check_shapes, check_values
from fp8rl.correction.errors import ShapeError
from fp8rl.correction.layout import Layout, layout_of
from fp8rl.correction.losses_config import LossConfig
from fp8rl.correction.objectives import Objective, objective
from fp8rl.correction.ratios import masked


@dataclass(frozen=True, eq=False)
class LossOutput:
    """A loss to call `backward` on, and what to log.

    Attributes:
        loss: scalar in fp32 or wider, with gradient.
        metrics: name -> scalar tensor without gradient: sums over kept tokens divided by
            `counts.tokens` as given, so over micro-batches they add up; `policy/ratio_max` is a
            maximum.
        counts: those of the batch given here, whatever the loss was divided by.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    counts: Counts


def policy_loss(
    config: LossConfig,
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, " batch"] | Float[Tensor, "*tokens"],
    weights: Float[Tensor, "*tokens"],
    kept: Bool[Tensor, "*tokens"],
    *,
    counts: Counts | None = None,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> LossOutput:
    """Corrected loss; gradient flows through `logprobs` alone, and nothing waits for the device.

    All tensors are padded [batch, tokens], or with `cu_seqlens` packed [tokens].

    Args:
        config: which loss, and how it is aggregated. `mastered` is not looked at here.
        logprobs: of the policy being stepped, with gradient, nats.
        old_logprobs: of pi_old, nats; whose that is, says the mode (see above).
        advantages: one for each sequence [batch], or one for each token.
        weights: `Correction.weights`, or ones.
        kept: bool, `Correction.kept`. If nothing is kept, loss and gradient are 0.
        counts: what to divide by; default: what is kept here. With micro-batches or data
            parallelism give `count` of all of them and *add* the results (DDP averages gradients:
            multiply the loss by the number of ranks).
        cu_seqlens: int [batch + 1], where the packed sequences begin and end.

    Raises:
        MaskError, ShapeError: the tensors do not fit together.
        LogProbError: an unmasked log-prob is NaN, infinite or positive.
        ValueRangeError: unmasked advantages or weights are not finite, or a count is not a
            positive number. (On CUDA, where looking would wait, values make the loss NaN instead.)
    """
    layout = layout_of(kept, cu_seqlens, "kept")
    advantages = per_token(advantages, kept, layout)
    logs = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    factors = {"advantages": advantages, "weights": weights}
    check_shapes(kept, logs | factors)
    poison = check_values(kept, logprobs=logs, finite=factors)

    new, old = masked(logprobs, kept), masked(old_logprobs.detach(), kept)
    advantage, weight = masked(advantages.detach(), kept), masked(weights.detach(), kept)
    found = objective(config, new, old, advantage, kept, layout)
    own = counts_of(kept, layout)
    total = usable(own if counts is None else counts, own, new.dtype)
    mean = aggregate(config, weight * found.factor * advantage, kept, layout, total)
    # times 1 or NaN: added, a NaN would not reach the gradient
    loss = -mean * (1 + poison)
    kl = (old - new.detach()).sum()
    return LossOutput(loss, _metrics(found, kl, kept, total), own)


def per_token(advantages: Tensor, kept: Tensor, layout: Layout) -> Tensor:
    """Advantages of sequences [batch] spread over their tokens; those of tokens as they are.

    Raises:
        ShapeError: they are neither.
    """
    if advantages.shape == kept.shape:
        return advantages
    if advantages.shape == (layout.sequences,):
        return layout.spread(advantages)
    raise ShapeError(
        f"advantages: shape {list(advantages.shape)}, expected one for each of the "
        f"{layout.sequences} sequences or for each token {list(kept.shape)}"
    )


@torch.no_grad()
def _metrics(found: Objective, kl: Tensor, kept: Tensor, total: Counts) -> dict[str, Tensor]:
    """Fractions and means over kept tokens; veRL's names where it has them."""
    seen = torch.where(kept, found.ratio, 0.0)
    high, low, dual = (x / total.tokens for x in (found.high, found.low, found.dual))
    return {
        "policy/clip_fraction_high": high,
        "policy/clip_fraction_low": low,
        "policy/ratio_mean": seen.sum() / total.tokens,
        "policy/ratio_max": seen.amax(),
        "actor/pg_clipfrac": high + low,
        "actor/pg_clipfrac_lower": dual,
        "actor/ppo_kl": kl / total.tokens,
    }
