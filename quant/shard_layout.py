"""Where the shards of a weight lie, and which blocks they share: geometry, without a number.

    box      offset and shape of one rank's part, in elements of the whole weight
    layout   the boxes of all ranks of a group: they tile the whole, without overlap or gap
    shared   a block that lies in two or more boxes
    piece    a part of a box that begins at a block's border or ends before the next: the pieces of
             a box are its whole blocks, in one, and the strips around them, of shared blocks

A layout holds the boxes of all ranks, not of this one alone: then every rank finds the same shared
blocks, in the same order, without asking the others, and whether they have to speak at all.

Left out: parts that are no boxes (flat ranges, as of Megatron's distributed optimizer or FSDP1);
gather those into boxes first.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fp8rl.quant.errors import ShardError


@dataclass(frozen=True)
class Box:
    """One rank's part of a weight: the elements from `offset` up to `offset + shape`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index, for each dimension."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of this part in the whole tensor."""
        return tuple(map(slice, self.offset, self.stop))

    @property
    def empty(self) -> bool:
        """Whether there is no element in it."""
        return 0 in self.shape

    def blocks(self, block_size: tuple[int, int]) -> "Box":
        """Return the box of blocks that this one touches, in the grid of the whole's scales."""
        sizes = (1,) * (len(self.shape) - 2) + block_size
        first = tuple(o // b for o, b in zip(self.offset, sizes, strict=True))
        last = (math.ceil(s / b) for s, b in zip(self.stop, sizes, strict=True))
        extents = zip(first, last, self.shape, strict=True)
        return Box(first, tuple(b - a if size else 0 for a, b, size in extents))


@dataclass(frozen=True)
class Piece:
    """A part of a box: `at` in the box, `blocks` in the grid of blocks that the box touches.

    shared: whether its blocks lie in other boxes too. Otherwise they are whole.
    """

    at: tuple[slice, ...]
    blocks: tuple[slice, ...]
    shared: bool


@dataclass(frozen=True)
class ShardLayout:
    """How a weight [N, K] or [E, N, K] is divided over the ranks of a group.

    shape: of the whole weight. boxes: the part of each rank, in order of group rank; some may be
    empty.

    Raises ShardError where the boxes overlap, leave a gap or do not fit the shape.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        """Refuse boxes that do not tile the whole."""
        if len(self.shape) not in (2, 3):
            raise ShardError(f"a sharded weight must be [N, K] or [E, N, K], found {self.shape}")
        for rank, box in enumerate(self.boxes):
            if not (len(box.offset) == len(box.shape) == len(self.shape)) or any(
                not 0 <= start <= stop <= size
                for start, stop, size in zip(box.offset, box.stop, self.shape, strict=True)
            ):
                raise ShardError(
                    f"part {rank}: offset {box.offset} and shape {box.shape} do not lie in a "
                    f"weight of {self.shape}"
                )
        check_tiling(self.shape, self.boxes)

    @classmethod
    def split(cls, shape: tuple[int, ...], dim: int, sizes: Sequence[int]) -> "ShardLayout":
        """Divide dimension `dim` into consecutive parts of `sizes`, one for each rank."""
        dim = dim % len(shape)
        boxes, start = [], 0
        for size in sizes:
            offset, part = [0] * len(shape), list(shape)
            offset[dim], part[dim] = start, size
            boxes.append(Box(tuple(offset), tuple(part)))
            start += size
        return cls(tuple(shape), tuple(boxes))

    @classmethod
    def chunk(cls, shape: tuple[int, ...], dim: int, ranks: int) -> "ShardLayout":
        """Divide dimension `dim` as torch.chunk, FSDP2 and DTensor do.

        Each rank has ceil(size / ranks) of it, the last ones less, or nothing. Where it divides
        evenly this is tensor parallelism's split too.
        """
        size = shape[dim]
        each = math.ceil(size / ranks)
        return cls.split(shape, dim, [min(each, max(size - r * each, 0)) for r in range(ranks)])

    @cached_property
    def text(self) -> str:
        """The parts in words, the same for the same layout."""
        parts = (f"{r}: {list(b.shape)} at {list(b.offset)}" for r, b in enumerate(self.boxes))
        return f"{list(self.shape)} in parts {', '.join(parts)}"

    def pieces(self, rank: int, block_size: tuple[int, int]) -> list[Piece]:
        """Cut the box of `rank` where its blocks cease or begin to be whole."""
        box = self.boxes[rank]
        if box.empty:
            return []
        lead = tuple(slice(0, n) for n in box.shape[:-2])
        segments = [
            _segments(start, stop, size, block)
            for start, stop, size, block in zip(
                box.offset[-2:], box.stop[-2:], self.shape[-2:], block_size, strict=True
            )
        ]
        return [
            Piece((*lead, row[0], col[0]), (*lead, row[1], col[1]), row[2] or col[2])
            for row, col in itertools.product(*segments)
        ]


def _segments(start: int, stop: int, size: int, block: int) -> list[tuple[slice, slice, bool]]:
    """Cut [start, stop) of a dimension: elements from start, blocks from the first, shared or not.

    The block at the end of the whole is whole, however short.
    """
    low = min(-(-start // block) * block, stop)
    high = stop if stop == size else max(stop // block * block, low)
    first = start // block
    return [
        (slice(a - start, b - start), slice(a // block - first, -(-b // block) - first), shared)
        for a, b, shared in ((start, low, True), (low, high, False), (high, stop, True))
        if a < b
    ]


@lru_cache(maxsize=4096)
def shared_blocks(
    layout: ShardLayout, block_size: tuple[int, int], rank: int, device: torch.device
) -> tuple[int, Tensor, Tensor]:
    """Find the blocks of a layout that two or more ranks share.

    Returns how many there are in all; and for those that `rank` shares, int64 on `device`, their
    flat index in the grid of blocks that its box touches, and their number among all shared ones
    (row-major in the whole). All ranks number them alike.
    """
    sizes = (1,) * (len(layout.shape) - 2) + block_size
    grid = tuple(math.ceil(n / b) for n, b in zip(layout.shape, sizes, strict=True))
    sharers = torch.zeros(grid, dtype=torch.int32)
    for box in layout.boxes:
        sharers[box.blocks(block_size).slices] += 1
    shared = sharers > 1
    number = shared.flatten().cumsum(0).view(grid) - 1
    here = layout.boxes[rank].blocks(block_size).slices
    cells = shared[here].flatten().nonzero().flatten()
    slots = number[here].flatten()[cells]
    return int(shared.sum()), cells.to(device), slots.to(device)


def check_tiling(shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise ShardError unless every element lies in one box: counted on the grid of all cuts."""
    filled = [box for box in boxes if not box.empty]
    cuts = [
        sorted({0, size, *(b.offset[dim] for b in filled), *(b.stop[dim] for b in filled)})
        for dim, size in enumerate(shape)
    ]
    count = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.int32)
    for box in filled:
        cell = zip(cuts, box.offset, box.stop, strict=True)
        count[tuple(slice(bisect_left(c, a), bisect_left(c, b)) for c, a, b in cell)] += 1
    wrong = (count != 1).nonzero()
    if len(wrong) == 0:
        return
    first = wrong[0].tolist()
    start = tuple(c[i] for c, i in zip(cuts, first, strict=True))
    stop = tuple(c[i + 1] for c, i in zip(cuts, first, strict=True))
    owners = [
        rank
        for rank, b in enumerate(boxes)
        if all(o <= s < e for o, s, e in zip(b.offset, start, b.stop, strict=True))
    ]
    found = f"overlap: parts {owners} all hold" if owners else "leave a gap: none of them holds"
    raise ShardError(
        f"the parts of a weight of {shape} {found} the elements from {start} to {stop}; "
        "each element must lie in exactly one part"
    )
