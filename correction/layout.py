"""Padded and packed batches behind one interface: what a sequence's tokens are.

    padded   mask [batch, tokens]; a row is a sequence
    packed   mask [tokens], and cu_seqlens [batch + 1]: sequence b is tokens[cu[b] : cu[b + 1]]

Everything else in this room is elementwise, so that both give the same results. `parts` cuts a
batch into runs of whole sequences that fit the CPU's caches; what is computed of them adds up.
On CUDA, and while torch.compile traces, a batch is one part: there the kernel's launch costs, and
a compiler fuses. Leaves out: packed sequences that straddle ranks (context parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8rl.correction.checks import waits
from fp8rl.correction.errors import MaskError, ShapeError

# 512 KiB of fp32, half of it a core: what an operation reads and writes stays in L2
PART_TOKENS = 131072


@dataclass(frozen=True)
class Padded:
    """[batch, tokens]; a row is a sequence. Tensors "like mask" have this shape."""

    sequences: int
    width: int
    whole: bool

    def sum(self, x: Tensor) -> Tensor:
        """Sums over sequences: like mask -> [batch], of the dtype of `x`; differentiable."""
        return x.sum(dim=1)

    def count(self, tokens: Tensor) -> Tensor:
        """How many of a bool like mask are True, fp64 [batch]."""
        return tokens.int().float().sum(dim=1).double()  # exact to 2^24 tokens, and quick

    def spread(self, row: Tensor) -> Tensor:
        """A value for each sequence to its tokens: [batch] -> like mask; differentiable."""
        return row[:, None].expand(self.sequences, self.width)

    def parts(self) -> Iterator[tuple[slice, Padded]]:
        """Runs of whole sequences: where they stand in dim 0 of a tensor, and their layout."""
        step = self.sequences if self.whole else max(1, PART_TOKENS // self.width)
        for start in range(0, self.sequences, step):
            rows = min(step, self.sequences - start)
            yield slice(start, start + rows), Padded(rows, self.width, self.whole)


@dataclass(frozen=True, eq=False)
class Packed:
    """[tokens], sequences one after the other; `bounds` is cu_seqlens, from 0 to tokens."""

    sequences: int
    bounds: Tensor
    owner: Tensor  # int32 [tokens]: which sequence a token belongs to
    whole: bool

    def sum(self, x: Tensor) -> Tensor:
        """As of `Padded`."""
        return x.new_zeros(self.sequences).index_add(0, self.owner, x)

    def count(self, tokens: Tensor) -> Tensor:
        """As of `Padded`."""
        return self.sum(tokens.float()).double()

    def spread(self, row: Tensor) -> Tensor:
        """As of `Padded`."""
        return row[self.owner]

    def parts(self) -> Iterator[tuple[slice, Packed]]:
        """As of `Padded`."""
        if self.whole:
            yield slice(0, len(self.owner)), self
            return
        bounds = self.bounds.tolist()
        first = 0
        while first < self.sequences:
            last = first + 1
            while last < self.sequences and (
                bounds[last + 1] - bounds[first] <= PART_TOKENS
                # no part without tokens: nothing has no extremes
                or bounds[last] in (bounds[first], bounds[last + 1])
            ):
                last += 1
            tokens = slice(bounds[first], bounds[last])
            owner, shifted = self.owner[tokens] - first, self.bounds[first : last + 1]
            yield tokens, Packed(last - first, shifted - bounds[first], owner, self.whole)
            first = last


Layout = Padded | Packed


def layout_of(mask: Tensor, cu_seqlens: Tensor | None, name: str = "mask") -> Layout:
    """The layout of a batch with this mask, which the caller calls `name`.

    Args:
        mask: bool [batch, tokens], or [tokens] with `cu_seqlens`.
        cu_seqlens: int [batch + 1], ascending from 0 to the number of tokens, on the mask's
            device. On CUDA its values are not looked at: that would wait for the device.

    Raises:
        MaskError: the mask is not boolean, not of that many dimensions, or has no positions.
        ShapeError: cu_seqlens is not such a tensor.
    """
    if mask.dtype != torch.bool:
        raise MaskError(
            f"{name}: dtype {mask.dtype}, expected torch.bool with True for tokens that count; "
            f"use {name}.bool()"
        )
    whole = waits(mask.device)
    if cu_seqlens is None:
        if mask.ndim != 2 or mask.numel() == 0:
            raise MaskError(
                f"{name}: shape {list(mask.shape)}, expected a non-empty [batch, tokens], or with "
                "cu_seqlens [tokens]"
            )
        return Padded(mask.shape[0], mask.shape[1], whole)
    if mask.ndim != 1 or mask.numel() == 0:
        raise MaskError(
            f"{name}: shape {list(mask.shape)}, expected a non-empty [tokens] with cu_seqlens"
        )
    _check_bounds(cu_seqlens, len(mask), whole)
    bounds = cu_seqlens.int()
    position = torch.arange(len(mask), dtype=torch.int32, device=mask.device)
    owner = torch.searchsorted(bounds[1:], position, right=True, out_int32=True)
    # a wrong cu_seqlens on CUDA must not become an index out of range
    owner = owner.clamp(max=len(cu_seqlens) - 2)
    return Packed(len(cu_seqlens) - 1, bounds, owner, whole)


def _check_bounds(cu_seqlens: Tensor, tokens: int, whole: bool) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ShapeError(
            f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)}, expected integers "
            "[batch + 1], such as [0, 3, 7] for sequences of 3 and 4 tokens"
        )
    if whole:
        return
    ascending = bool((cu_seqlens.diff() >= 0).all())
    if not ascending or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens:
        raise ShapeError(
            f"cu_seqlens: {cu_seqlens.tolist()[:8]}..., last {int(cu_seqlens[-1])}; expected to "
            f"ascend from 0 to the {tokens} tokens of mask"
        )
