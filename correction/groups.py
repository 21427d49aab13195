"""The mismatch of groups of tokens: by position in the response, or by the age of their weights.

A token's position is its number among the unmasked tokens of its sequence, from 0; its age is how
many weight versions were published since the one that wrote it. Reported for each group: `tokens`,
`kl` and `k3_kl` as in `metrics.py`, and `eff_sample_size` of the raw token ratios.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fp8rl.correction.errors import LogProbError, MaskError, ValueRangeError
from fp8rl.correction.layout import layout_of
from fp8rl.correction.metrics import PREFIX
from fp8rl.correction.ratios import LOG_RATIO_LIMIT, checked_log_ratios


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group a token belongs to.

    Attributes:
        labels: names of the groups, such as `position_0_511` or `age_1`.
        index: int64 like mask, in [0, len(labels)); anything at masked positions.
    """

    labels: tuple[str, ...]
    index: Int[Tensor, "*tokens"]


def by_position(
    mask: Bool[Tensor, "*tokens"],
    edges: Sequence[int],
    *,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
) -> Groups:
    """Groups of positions `[0, edges[0])`, `[edges[0], edges[1])`, ... and from the last edge on.

    Raises:
        ValueRangeError: the edges are not positive and ascending.
    """
    if list(edges) != sorted(set(edges)) or (edges and edges[0] <= 0):
        raise ValueRangeError(f"edges: {list(edges)}, expected positive ascending positions")
    layout = layout_of(mask, cu_seqlens)
    before = mask.flatten().cumsum(0).view(mask.shape)  # unmasked tokens up to here, all sequences
    ends = layout.sum(mask.long()).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    position = before - 1 - layout.spread(starts)
    bounds = torch.tensor(list(edges), device=mask.device, dtype=torch.int64)
    bounded = [f"position_{a}_{b - 1}" for a, b in zip([0, *edges], edges, strict=False)]
    last = f"position_{edges[-1]}_" if edges else "position_0_"
    return Groups((*bounded, last), torch.bucketize(position, bounds, right=True))


def by_age(ages: Int[Tensor, "*tokens"], oldest: int) -> Groups:
    """A group for each age 0 .. oldest - 1, and one of `oldest` and older.

    Raises:
        ValueRangeError: `oldest` is negative.
    """
    if oldest < 0:
        raise ValueRangeError(f"oldest: {oldest}, expected 0 or more")
    labels = [f"age_{age}" for age in range(oldest)]
    return Groups((*labels, f"age_{oldest}_"), ages.long().clamp(0, oldest))


@torch.no_grad()
def group_metrics(
    groups: Groups,
    train_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """`rollout_corr/{metric}_{label}` for each group that has tokens; of all ranks of `group`.

    Raises:
        MaskError, ShapeError, LogProbError: as `correct`.
    """
    if mask.dtype != torch.bool or groups.index.shape != mask.shape:
        raise MaskError(
            f"mask: {mask.dtype} {list(mask.shape)}, expected torch.bool like the groups' index "
            f"{list(groups.index.shape)}"
        )
    log_ratio, poison = checked_log_ratios(train_logprobs, rollout_logprobs, mask)
    lr = log_ratio.double().flatten()
    bounded = lr.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = bounded.exp()
    one = mask.flatten().double()
    quantities = [one, -lr, torch.expm1(bounded) - bounded, ratio * one, ratio.square() * one]
    index = torch.where(mask, groups.index, 0).flatten()
    sums = torch.stack(quantities).new_zeros(len(quantities), len(groups.labels))
    sums = sums.index_add(1, index, torch.stack(quantities)) + poison
    if group is not None:
        dist.all_reduce(sums, group=group)
    named: dict[str, float] = {}
    columns = sums.T.tolist()
    if any(math.isnan(column[0]) for column in columns):
        raise LogProbError(
            "train_logprobs, rollout_logprobs: an unmasked value is NaN, infinite or positive; "
            "expected finite log-probabilities (at most 0)"
        )
    for label, column in zip(groups.labels, columns, strict=True):
        tokens, k1, k3, first, second = column
        if tokens:
            named |= {
                f"{PREFIX}tokens_{label}": tokens,
                f"{PREFIX}kl_{label}": k1 / tokens,
                f"{PREFIX}k3_kl_{label}": k3 / tokens,
                f"{PREFIX}eff_sample_size_{label}": min(1.0, first**2 / (tokens * second)),
            }
    return named
