"""Quantizing a weight of which each rank holds a part, as if one rank held it all, bit for bit.

    amax[block] = max over the ranks that share it of max |x| of their pieces

A block that lies in one part is quantized there, by `quantize_blockwise`. A block that a cut goes
through needs the largest magnitude of all its pieces: the ranks exchange those of the shared blocks
alone, 4 bytes each, in one MAX all-reduce for all the weights of a call, and each casts its pieces
with the common scale. Magnitudes travel as the bits of their fp32, whose order as integers is the
same, on Gloo and NCCL alike. No weight leaves its rank. With sticky scales the previous scales of
the shared blocks travel too, 4 bytes more each: where ranks have different ones, whatever the
reason, all go on from the largest.

Who speaks: all ranks of the group call with the same weights in the same order. There are two
collectives, or one where no block of any weight is shared. The first finds out whether the ranks
agree and all values are finite. If not, every rank raises (a NaN as quantizing the whole weight
would: all elements counted, first index in the whole), none is left waiting, and the group stays
usable.

Left out: MXFP8 and activations, whose groups no split between rows cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from fp8rl.quant.blockwise import FP32Source, quantize_blockwise, weight_values
from fp8rl.quant.errors import NonFiniteWeightError, QuantFormatError, ShardError
from fp8rl.quant.reference import block_amax, cast_with_scale
from fp8rl.quant.scales import ScaleFormat, scales_of
from fp8rl.quant.shard_agreement import Peers
from fp8rl.quant.shard_layout import Box, Piece, ShardLayout, shared_blocks
from fp8rl.quant.sticky import check_previous
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor, check_format

_NOWHERE = 2**62  # an index after all others


@dataclass(frozen=True, eq=False)
class WeightShard:
    """This rank's part of a weight: bf16, fp16 or fp32, with the shape of its box in `layout`.

    previous_scale_inv: that of the `QuantizedShard` of last time, for sticky scales (sticky.py).
    """

    name: str
    local: Float[Tensor, "*experts n k"]
    layout: ShardLayout
    previous_scale_inv: Float32[Tensor, "*experts nb kb"] | None = None

    @property
    def text(self) -> str:
        """What all ranks must have in common, in words."""
        sticky = "" if self.previous_scale_inv is None else "with previous scales "
        return f"{self.name}: {self.local.dtype} {sticky}{self.layout.text}"


@dataclass(frozen=True, eq=False)
class QuantizedShard:
    """One rank's part of a quantized weight.

    shape: of the whole weight. box: where this part lies in it.
    data: float8_e4m3fn, the shape of the box.
    scale_inv: float32, of every block the box touches, shared ones too: all sharers hold the same.
        Its place among the scales of the whole is `box.blocks(block_size)`.

    Raises ShardError where data or scales do not have those shapes.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    data: Shaped[Tensor, "*experts n k"]
    scale_inv: Float32[Tensor, "*experts nb kb"]
    block_size: tuple[int, int]
    scale_format: ScaleFormat

    def __post_init__(self) -> None:
        """Refuse parts that do not fit the box."""
        found = (tuple(self.data.shape), tuple(self.scale_inv.shape))
        expected = (self.box.shape, self.box.blocks(self.block_size).shape)
        if found != expected or self.data.dtype != FP8_DTYPE:
            raise ShardError(
                f"{self.name}: data and scale_inv of {self.box} must have shapes {expected} and "
                f"data be {FP8_DTYPE}, found {found} and {self.data.dtype}"
            )


def quantize_shards(
    shards: Sequence[WeightShard],
    *,
    group: dist.ProcessGroup | None = None,
    block_size: tuple[int, int] = (128, 128),
    scale_format: ScaleFormat = "pow2",
    fp32_as: FP32Source | None = None,
) -> list[QuantizedShard]:
    """Quantize this rank's parts of some weights, together with the ranks that hold the others.

    Every rank of `group` (None: the default group) calls this with the same weights in the same
    order; the boxes of each layout are those of the group's ranks. Gloo or NCCL. Other arguments
    are those of `quantize_blockwise`. Results are in the order of `shards`.

    Raises, on every rank: NonFiniteWeightError on NaN or Inf in any part; ShardError where ranks
    differ in names, layouts, dtypes or options, and on the ranks whose peer raises. On the rank
    alone that made the mistake: QuantFormatError as `quantize_blockwise`, ShardError where a part
    has not the shape of its box or the layout not the ranks of the group.
    """
    peers = Peers(group)
    casts: list[_Cast] = []
    failure: ValueError | None = None
    try:
        check_format(block_size, scale_format)
        casts = [_Cast(s, peers, block_size, scale_format, fp32_as) for s in shards]
    except (QuantFormatError, ShardError) as error:
        failure = error
    lines = [f"block_size={block_size}, scale_format={scale_format}, fp32_as={fp32_as}"]
    lines += [shard.text for shard in shards]
    if peers.agree(lines, failure, any(not cast.finite for cast in casts)):
        raise _non_finite(casts, peers)
    if any(cast.shared for cast in casts):
        _share(casts, peers)
    return [cast.finish() for cast in casts]


class _Cast:
    """The cast of one part: what needs no other rank at once, the rest in `finish`."""

    def __init__(
        self,
        shard: WeightShard,
        peers: Peers,
        block_size: tuple[int, int],
        scale_format: ScaleFormat,
        fp32_as: FP32Source | None,
    ) -> None:
        self.shard, self.block_size, self.scale_format = shard, block_size, scale_format
        layout = shard.layout
        if len(layout.boxes) != peers.ranks:
            raise ShardError(
                f"{shard.name}: its layout has {len(layout.boxes)} parts and the group "
                f"{peers.ranks} ranks; pass the group whose ranks hold the parts"
            )
        self.box = layout.boxes[peers.rank]
        if tuple(shard.local.shape) != self.box.shape:
            raise ShardError(
                f"{shard.name}: rank {peers.rank} of the group holds {tuple(shard.local.shape)}, "
                f"and {self.box.shape} of {layout.shape} in its layout"
            )
        self.values = weight_values(shard.local, fp32_as, shard.name)
        device = self.values.device
        self.data = torch.empty(self.box.shape, dtype=FP8_DTYPE, device=device)
        grid = self.box.blocks(block_size).shape
        self.amax = torch.zeros(grid, dtype=torch.float32, device=device)  # of shared blocks alone
        self.scale_inv = torch.empty_like(self.amax)
        self.sticky = shard.previous_scale_inv is not None
        if shard.previous_scale_inv is not None:
            check_previous(shard.previous_scale_inv, grid, device, scale_format, shard.name)
            self.scale_inv.copy_(shard.previous_scale_inv)
        self.pieces = layout.pieces(peers.rank, block_size)
        self.shared, self.cells, self.slots = shared_blocks(layout, block_size, peers.rank, device)
        self.finite = all([self._begin(piece) for piece in self.pieces])

    def _begin(self, piece: Piece) -> bool:
        """Quantize a piece of whole blocks, or take the amax of the others; tell if it is finite.

        The strips begin or end at the border of a block, so padding them does not move a block.
        """
        part = self.values[piece.at]
        if piece.shared:
            self.amax[piece.blocks] = block_amax(part, self.block_size)
            return bool(torch.isfinite(self.amax[piece.blocks]).all())
        out = self._out(piece)
        try:
            q = quantize_blockwise(
                part,
                block_size=self.block_size,
                scale_format=self.scale_format,
                name=self.shard.name,
                fp32_as="master",  # `values` are already what is to be quantized
                out=out,
                previous_scale_inv=self.scale_inv[piece.blocks] if self.sticky else None,
            )
        except NonFiniteWeightError:
            return False
        if out is None:
            self.data[piece.at] = q.data
            self.scale_inv[piece.blocks] = q.scale_inv
        return True

    def _out(self, piece: Piece) -> QuantizedTensor | None:
        """The place of a piece in the result, if it can be written to directly."""
        data, scale_inv = self.data[piece.at], self.scale_inv[piece.blocks]
        if not (data.is_contiguous() and scale_inv.is_contiguous()):
            return None
        return QuantizedTensor(data, scale_inv, self.block_size, self.scale_format)

    def finish(self) -> "QuantizedShard":
        """Cast the pieces of shared blocks by the amax that all ranks found."""
        previous = self.scale_inv if self.sticky else None
        scale, scale_inv = scales_of(self.amax, self.scale_format, previous)
        for piece in self.pieces:
            if piece.shared:
                self.scale_inv[piece.blocks] = scale_inv[piece.blocks]
                self.data[piece.at] = cast_with_scale(
                    self.values[piece.at], scale[piece.blocks], self.block_size
                )
        return QuantizedShard(
            self.shard.name,
            self.shard.layout.shape,
            self.box,
            self.data,
            self.scale_inv,
            self.block_size,
            self.scale_format,
        )


def _share(casts: Sequence[_Cast], peers: Peers) -> None:
    """Make the amax of every shared block, and its previous scale, the largest of all ranks."""
    grids = [(cast, cast.amax) for cast in casts]
    grids += [(cast, cast.scale_inv) for cast in casts if cast.sticky]
    counts = [cast.shared for cast, _ in grids]
    bits = torch.zeros(sum(counts), dtype=torch.int32, device=casts[0].values.device)
    for (cast, grid), here in zip(grids, torch.split(bits, counts), strict=True):
        here[cast.slots] = grid.view(torch.int32).flatten()[cast.cells]
    bits = peers.largest(bits)
    for (cast, grid), here in zip(grids, torch.split(bits, counts), strict=True):
        grid.view(torch.int32).flatten()[cast.cells] = here[cast.slots]


def _non_finite(casts: Sequence[_Cast], peers: Peers) -> NonFiniteWeightError:
    """Find out together what is wrong with the first weight that has a non-finite element."""
    found = torch.tensor([_count(cast) for cast in casts], dtype=torch.int64)
    everywhere = torch.stack(peers.gather(found))  # [ranks, weights, 3]
    counts = everywhere[:, :, 0].sum(dim=0)
    weight = int(counts.nonzero()[0])
    of_weight = everywhere[:, weight]
    _, first, bits = of_weight[of_weight[:, 1].argmin()].tolist()
    shape = casts[weight].shard.layout.shape
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), shape))
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    return NonFiniteWeightError(casts[weight].shard.name, int(counts[weight]), index, value)


def _count(cast: _Cast) -> tuple[int, int, int]:
    """Count the non-finite elements of a part; flat index in the whole and bits of the first."""
    bad = (~torch.isfinite(cast.values)).nonzero()
    if len(bad) == 0:
        return 0, _NOWHERE, 0
    first, flat = bad[0].tolist(), 0
    for i, start, size in zip(first, cast.box.offset, cast.shard.layout.shape, strict=True):
        flat = flat * size + start + i
    value = cast.values[tuple(first)].float().view(torch.int32)
    return len(bad), flat, int(value)


def join_shards(parts: Sequence[QuantizedShard]) -> QuantizedTensor:
    """Put the parts of one weight together, in any order, on the device of the first.

    Raises ShardError where they overlap or leave a gap, are of different weights or formats, or
    disagree about the scale of a block that they share.
    """
    if not parts:
        raise ShardError("no parts to join")
    one = parts[0]
    for part in parts:
        found = (part.name, part.shape, part.block_size, part.scale_format)
        expected = (one.name, one.shape, one.block_size, one.scale_format)
        if found != expected:
            raise ShardError(
                "parts to join must be of one weight and format (name, shape, block size, scale "
                f"format), found {expected} and {found}"
            )
    ShardLayout(one.shape, tuple(part.box for part in parts))
    whole = Box((0,) * len(one.shape), one.shape)
    data = torch.empty(one.shape, dtype=FP8_DTYPE, device=one.data.device)
    grid = whole.blocks(one.block_size).shape
    scale_inv = torch.zeros(grid, dtype=torch.float32, device=one.data.device)
    for part in parts:
        data[part.box.slices].copy_(part.data)
        blocks = scale_inv[part.box.blocks(one.block_size).slices]
        scales = part.scale_inv.to(blocks.device)
        if bool(((blocks != 0) & (blocks != scales)).any()):  # no scale is 0: not yet written
            raise ShardError(
                f"{one.name}: the part {part.box} has another scale than its neighbours for a "
                "block that they share; quantize all parts of a weight in one quantize_shards"
            )
        blocks.copy_(scales)
    return QuantizedTensor(data, scale_inv, one.block_size, one.scale_format)
