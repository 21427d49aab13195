"""What each loss makes of a token: the factor `f` in `-w A f`, through which the gradient flows.

With `rho = exp(log pi - log pi_old)`, `A` the advantage, and sg for "stop gradient":

    ppo_clip    f A = min(rho A, clip(rho, 1 - low, 1 + high) A)              arXiv 1707.06347
                for A < 0 and dual clip c: max(that, c A)                     arXiv 1912.09729
    gspo        the same with s pi / sg(pi) for rho, where                    arXiv 2507.18071
                s = sg(exp(mean of log rho over the sequence's kept tokens))
    cispo       f = sg(clip(rho, 1 - low, 1 + high)) log pi                   arXiv 2506.13585
    reinforce   f = log pi

GSPO is its token form, GSPO-token: the value is the sequence ratio's, and each token's gradient
carries that token's own advantage. Log-ratios are clamped to +-20 before `exp`, so a ratio is
always finite; beyond, it has no gradient. Leaves out: KL and entropy terms.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, count_nonzero

from fp8rl.correction.aggregation import token_means
from fp8rl.correction.layout import Layout
from fp8rl.correction.losses_config import GSPO, LossConfig, PPOClip
from fp8rl.correction.ratios import bounded_exp


@dataclass(frozen=True, eq=False)
class Objective:
    """What a loss makes of the tokens.

    Attributes:
        factor: what multiplies weight and advantage, like the mask, with gradient.
        ratio: the ratio that is clipped, like the mask, without gradient; at tokens that are not
            kept it means nothing.
        high: 0-d, how many kept tokens' ratio the upper bound replaced.
        low: 0-d, those of the lower bound.
        dual: 0-d, those of the dual clip.
    """

    factor: Float[Tensor, "*tokens"]
    ratio: Float[Tensor, "*tokens"]
    high: Int[Tensor, ""]
    low: Int[Tensor, ""]
    dual: Int[Tensor, ""]


def objective(
    config: LossConfig,
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    kept: Bool[Tensor, "*tokens"],
    layout: Layout,
) -> Objective:
    """The tokens' objective under `config`.

    Args:
        config: which loss.
        logprobs: of the policy being stepped, with gradient; 0 where not kept.
        old_logprobs: of pi_old, without gradient; 0 where not kept.
        advantages: without gradient; 0 where not kept.
        kept: bool like these.
        layout: of `kept`.
    """
    log_ratio = logprobs - old_logprobs
    if config.kind == "gspo":
        # divided before it is summed: a sum of huge log-ratios of both signs could be NaN
        row = layout.sum(token_means(log_ratio.detach(), kept, layout))
        log_ratio = logprobs - logprobs.detach() + layout.spread(row)
    ratio = bounded_exp(log_ratio)
    if config.kind == "ppo_clip" or config.kind == "gspo":
        return _clipped(config, ratio, advantages)
    ratio = ratio.detach()
    none = torch.zeros((), dtype=torch.int64, device=kept.device)
    if config.kind == "reinforce":
        return Objective(logprobs, ratio, high=none, low=none, dual=none)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    return Objective(
        ratio.clamp(low, high) * logprobs,
        ratio,
        high=count_nonzero(ratio > high),  # the ratio of a token that is not kept is 1
        low=count_nonzero(ratio < low),
        dual=none,
    )


def _clipped(config: PPOClip | GSPO, ratio: Tensor, advantages: Tensor) -> Objective:
    """The minimum written out: a clip acts only where it lowers the objective.

    It never acts where the advantage is 0, so no token that is not kept is counted.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    negative = advantages < 0
    too_high = (advantages > 0) & (ratio > high)
    too_low = negative & (ratio < low)
    factor = ratio.masked_fill(too_high, high).masked_fill(too_low, low)
    dual = torch.zeros((), dtype=torch.int64, device=ratio.device)
    if config.kind == "ppo_clip" and config.dual_clip is not None:
        far_too_high = negative & (ratio > config.dual_clip)
        factor = factor.masked_fill(far_too_high, config.dual_clip)
        dual = count_nonzero(far_too_high)
    high_count, low_count = count_nonzero(too_high), count_nonzero(too_low)
    return Objective(factor, ratio.detach(), high=high_count, low=low_count, dual=dual)
