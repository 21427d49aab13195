"""Well-mastered positive tokens leave the loss (UloRL, arXiv 2507.19766), against entropy collapse.

    dropped  <=>  A > 0  and  p(token) >= probability  and  H < entropy

where H is the policy's mean token entropy: a correct answer's tokens that are all but certain
already are pushed no further while the policy is less diverse than wanted. `p` is pi_old's, the
policy that learns as it was when the batch came (UloRL's "current policy", the same at a batch's
first step): so it is known before the first micro-batch what is dropped, and `count` has it right
under micro-batches and data parallelism. UloRL's positive samples are those with reward 1; ours
are those with a positive advantage.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fp8rl.correction.checks import check_shapes, check_values, usable_logprob, waits
from fp8rl.correction.errors import ShapeError, ValueRangeError
from fp8rl.correction.layout import layout_of
from fp8rl.correction.losses import per_token
from fp8rl.correction.losses_config import MasteredTokens


@torch.no_grad()
def drop_mastered(
    config: MasteredTokens,
    old_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, " batch"] | Float[Tensor, "*tokens"],
    kept: Bool[Tensor, "*tokens"],
    entropy: Float[Tensor, ""] | float,
    *,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> Bool[Tensor, "*tokens"]:
    """`kept` without the well-mastered positive tokens; apply it before `count`.

    All tensors are padded [batch, tokens], or with `cu_seqlens` packed [tokens].

    Args:
        config: the two thresholds.
        old_logprobs: of pi_old, nats; in bypass mode the rollout's stand in for it.
        advantages: one for each sequence [batch], or one for each token.
        kept: bool, `Correction.kept`.
        entropy: mean token entropy of the policy over the batch (of all ranks), in nats, or an
            estimate of it; a number or a 0-d tensor.
        cu_seqlens: int [batch + 1], where the packed sequences begin and end.

    Raises:
        MaskError, ShapeError: the tensors do not fit together.
        LogProbError: an unmasked log-prob is NaN, infinite or positive.
        ValueRangeError: unmasked advantages are not finite, or entropy is NaN or infinite.
    """
    layout = layout_of(kept, cu_seqlens, "kept")
    advantages = per_token(advantages, kept, layout)
    check_shapes(kept, {"old_logprobs": old_logprobs, "advantages": advantages})
    check_values(kept, logprobs={"old_logprobs": old_logprobs}, finite={"advantages": advantages})
    if not isinstance(entropy, Tensor):
        entropy = torch.full((), entropy, device=kept.device)
    if entropy.ndim:
        raise ShapeError(f"entropy: shape {list(entropy.shape)}, expected one mean, in nats")
    if not waits(entropy.device) and not torch.isfinite(entropy):
        raise ValueRangeError(
            f"entropy: {entropy.item()}, expected the policy's mean token entropy, in nats"
        )
    # where an unusable log-prob could not be refused it stays, and makes the loss NaN
    certain = (old_logprobs >= math.log(config.probability)) & usable_logprob(old_logprobs)
    mastered = (advantages > 0) & certain
    return kept & ~(mastered & (entropy < config.entropy))
