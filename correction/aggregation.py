"""From a value for each token to one number: the four ways of averaging, over kept tokens alone.

    token-mean                sum of all / tokens                          DAPO (arXiv 2503.14476)
    seq-mean-token-mean       sum of each sequence's mean / sequences      GRPO (arXiv 2402.03300)
    seq-mean-token-sum        sum of all / sequences
    seq-mean-token-sum-norm   sum of all / (sequences * max_tokens)        Dr.GRPO (2503.20783)

The names are veRL's. A rejected token is in no sum and in no denominator, and a sequence counts if
a token of it is kept. Given the counts of a whole batch, what micro-batches and ranks get adds up
to what the whole batch would. Leaves out: sequences that straddle ranks (context parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fp8rl.correction.checks import waits
from fp8rl.correction.errors import ShapeError, ValueRangeError
from fp8rl.correction.layout import Layout, layout_of
from fp8rl.correction.losses_config import Aggregation, LossConfig


@dataclass(frozen=True, eq=False)
class Counts:
    """What a loss is divided by: numbers, or 0-d tensors.

    Attributes:
        tokens: kept tokens.
        sequences: sequences of which at least one token is kept.
    """

    tokens: Tensor | float | int
    sequences: Tensor | float | int

    def __add__(self, other: Counts) -> Counts:
        """Those of both batches together."""
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences)

    def divisor(self, aggregation: Aggregation) -> Tensor | float | int:
        """The one of the two that `aggregation` divides by."""
        return self.tokens if aggregation == "token-mean" else self.sequences


@torch.no_grad()
def count(
    kept: Bool[Tensor, "batch tokens"] | Bool[Tensor, " tokens"],
    *,
    cu_seqlens: Int[Tensor, " bounds"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Counts:
    """Count a batch, and with a process group the batches of all its ranks together.

    Args:
        kept: bool [batch, tokens], or packed [tokens] with `cu_seqlens`.
        cu_seqlens: int [batch + 1], where the packed sequences begin and end.
        group: every rank of it must call; None counts this batch alone.

    Returns:
        int64 0-d tensors, on the device of `kept`; nothing waits for that device.

    Raises:
        MaskError, ShapeError: `kept` is no mask of such a batch.
    """
    return counts_of(kept, layout_of(kept, cu_seqlens, "kept"), group)


def counts_of(kept: Tensor, layout: Layout, group: dist.ProcessGroup | None = None) -> Counts:
    """`count` for a layout that is known."""
    sequences = (lengths(kept, layout, torch.float32) > 0).sum()
    # not kept.sum(), which widens a bool eightfold first
    both = torch.stack([torch.count_nonzero(kept), sequences])
    if group is not None:
        dist.all_reduce(both, group=group)
    return Counts(both[0], both[1])


def lengths(kept: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Kept tokens of each sequence [batch], in a float `dtype`."""
    return layout.sum(kept.to(dtype))


def token_means(x: Tensor, kept: Tensor, layout: Layout) -> Tensor:
    """`x` divided by the kept tokens of its sequence: what sums to the sequences' means."""
    return x / layout.spread(lengths(kept, layout, x.dtype).clamp(min=1))


def aggregate(
    config: LossConfig,
    x: Float[Tensor, "*tokens"],
    kept: Bool[Tensor, "*tokens"],
    layout: Layout,
    counts: Counts,
) -> Float[Tensor, ""]:
    """One number from values of tokens.

    Args:
        config: its aggregation, and with seq-mean-token-sum-norm its max_tokens.
        x: a value for each token, 0 where not kept.
        kept: bool like `x`.
        layout: of `kept`.
        counts: from `usable`.
    """
    if config.aggregation == "seq-mean-token-mean":
        x = token_means(x, kept, layout)
    total = x.sum() / counts.divisor(config.aggregation)
    return total / config.max_tokens if config.max_tokens is not None else total


def usable(given: Counts, own: Counts, dtype: torch.dtype) -> Counts:
    """`given` as positive 0-d tensors of `dtype`; 1 where nothing is kept, for 0 / 0 is to be 0.

    Where checking would wait for the device, a number that is not positive becomes NaN.

    Raises:
        ShapeError: a count is no number.
        ValueRangeError: tokens are kept, and a count is not a positive finite number.
    """
    empty = torch.as_tensor(own.tokens) == 0
    return Counts(
        _usable("tokens", given.tokens, empty, dtype),
        _usable("sequences", given.sequences, empty, dtype),
    )


def _usable(name: str, given: Tensor | float | int, empty: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(given, Tensor):  # filled there: a copy to the device would wait for it
        given = torch.full((), given, dtype=dtype, device=empty.device)
    if given.ndim:
        raise ShapeError(f"counts.{name}: shape {list(given.shape)}, expected a number")
    total = torch.where(empty, 1.0, given.detach().to(dtype))
    good = torch.isfinite(total) & (total > 0)
    if not waits(empty.device) and not good:
        raise ValueRangeError(
            f"counts.{name}: {total.item()}, expected a positive number: those of all "
            "micro-batches and ranks together, as `count` gives them"
        )
    return torch.where(good, total, torch.nan)
