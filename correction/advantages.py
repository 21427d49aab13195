"""Advantages from groups of samples of one prompt, as in GRPO (arXiv 2402.03300).

    A_i = (R_i - mean(R)) / (std(R) + eps)        over the group of sample i, sample std (n - 1)
    A_i = R_i - mean(R)                           Dr.GRPO (arXiv 2503.20783): normalize=False

Leaves out: value functions, leave-one-out baselines.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fp8rl.correction.errors import ShapeError, ValueRangeError


def group_advantages(
    rewards: Float[Tensor, " samples"],
    group_size: int,
    *,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Float[Tensor, " samples"]:
    """Compare rewards within consecutive groups; a group of equal rewards gives exact zeros.

    Args:
        rewards: [groups * group_size], the samples of one prompt standing together.
        group_size: samples a prompt, at least 2.
        normalize: whether to divide by the group's standard deviation, which makes groups with
            little spread, the easiest and hardest prompts, count for more.
        eps: added to the standard deviation.

    Returns:
        fp32 advantages [groups * group_size].

    Raises:
        ShapeError: rewards are not one-dimensional, or are not whole groups of at least 2.
        ValueRangeError: a reward is NaN or infinite.
    """
    if rewards.ndim != 1 or group_size < 2 or rewards.numel() % group_size:
        raise ShapeError(
            f"rewards: shape {list(rewards.shape)} with group_size {group_size}, expected "
            "[groups * group_size] with a group_size of at least 2"
        )
    groups = rewards.double().view(-1, group_size)
    if not torch.isfinite(groups).all():
        first = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueRangeError(
            f"rewards: {rewards[first].item()} at [{first}]; expected finite numbers"
        )
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    # the mean of n equal floats need not be that float, and eps would magnify the rest
    constant = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return torch.where(constant, 0.0, advantages).flatten().float()
