"""Importance weights that correct a loss for the mismatch of rollout and training policies.

    none: w = 1          TIS: w = min(r, cap)          MIS: w = r if low <= r <= high, else dropped

TIS is from "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al.,
2025) and arXiv 2601.18150; MIS, its masked form, drops a token instead of bending its weight.
A dropped token leaves `kept`, and so the loss's denominator. A ratio that overflows saturates at
the cap. Leaves out: rejection by KL, bands, batch normalization of the weights.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.correction.checks import check_shapes, check_values
from fp8rl.correction.config import MIS, TIS, CorrectionConfig, Level
from fp8rl.correction.ratios import importance_ratios, log_ratios


@dataclass(frozen=True, eq=False)
class Correction:
    """What the loss needs, and the raw ratios beside it; all [batch, tokens], none with gradient.

    Attributes:
        weights: fp32; 0 wherever `kept` is False.
        kept: bool; the tokens that count in the loss and in its denominator.
        ratios: fp32; the ratios at the correction's level before truncation, 1 where masked.
    """

    weights: Float[Tensor, "batch tokens"]
    kept: Bool[Tensor, "batch tokens"]
    ratios: Float[Tensor, "batch tokens"]


def correct(
    config: CorrectionConfig,
    train_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
) -> Correction:
    """Weigh every unmasked token by what the learning policy thinks of it against the sampler.

    Args:
        config: `NoCorrection`, `TIS` or `MIS`.
        train_logprobs: the trainer's log-probs of the sampled tokens, [batch, tokens], nats; of
            the policy as it was when the batch came (pi_old), not of the one being stepped.
        rollout_logprobs: the engine's, with which it sampled; [batch, tokens], nats.
        mask: bool [batch, tokens], True for sampled tokens. An entirely masked batch is fine.

    Raises:
        MaskError, ShapeError: the tensors do not fit together.
        LogProbError: an unmasked log-prob is NaN, infinite or positive.
    """
    logprobs = {"train_logprobs": train_logprobs, "rollout_logprobs": rollout_logprobs}
    check_shapes(mask, logprobs)
    check_values(mask, logprobs=logprobs)
    level: Level = config.level if isinstance(config, TIS | MIS) else "token"
    with torch.no_grad():
        log_ratio = log_ratios(train_logprobs, rollout_logprobs, mask)
        ratios = importance_ratios(log_ratio, mask, level).float()
        kept, weights = mask, ratios
        match config:
            case TIS():
                weights = ratios.clamp(max=config.cap)
            case MIS():
                kept = mask & (ratios >= config.low) & (ratios <= config.high)
            case _:
                weights = torch.ones_like(ratios)
        return Correction(weights=torch.where(kept, weights, 0.0), kept=kept, ratios=ratios)
