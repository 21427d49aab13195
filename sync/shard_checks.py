"""What is checked of shards: that they tile the model, and read as they were described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fp8rl.quant import Box, QuantizedTensor, ShardError
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.shard_layout import check_tiling
from fp8rl.sync.errors import SourceError
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.source import TensorMeta


def by_number(
    metadata: Sequence[TensorMeta], shards: Sequence[LocalShard]
) -> dict[int, LocalShard]:
    """Find the tensor of each shard, as its number in the metadata; empty ones are left out.

    Raises SourceError where a name is not in the metadata or comes twice, in either.
    """
    numbers = {meta.name: i for i, meta in enumerate(metadata)}
    if len(numbers) < len(metadata):
        twice = next(meta.name for i, meta in enumerate(metadata) if numbers[meta.name] != i)
        raise SourceError(f"{twice} is in the metadata twice; every tensor must have its own name")
    found: dict[int, LocalShard] = {}
    for shard in shards:
        i = numbers.get(shard.name)
        if i is None:
            raise SourceError(
                f"a shard is described of {shard.name!r}, which is not in the metadata of "
                f"{len(metadata)} tensors; describe shards under the names of the metadata"
            )
        if i in found:
            raise SourceError(
                f"{shard.name}: this rank describes {found[i].box} and {shard.box}; a rank can "
                "hold one box of a tensor"
            )
        if not shard.box.empty:
            found[i] = shard
    return found


def check_tiles(meta: TensorMeta, boxes: Mapping[int, Box]) -> None:
    """Raise SourceError unless the boxes of the ranks (rank -> box) tile the tensor."""
    for rank, box in boxes.items():
        fits = len(box.offset) == len(box.shape) == len(meta.shape) and all(
            0 <= start <= stop <= size
            for start, stop, size in zip(box.offset, box.stop, meta.shape, strict=True)
        )
        if not fits:
            raise SourceError(
                f"{meta.name}: rank {rank} of the group describes {list(box.shape)} at "
                f"{list(box.offset)}, which does not lie in its shape {list(meta.shape)}"
            )
    none = Box((0,) * len(meta.shape), (0,) * len(meta.shape))
    try:
        check_tiling(
            meta.shape, [boxes.get(rank, none) for rank in range(max(boxes, default=0) + 1)]
        )
    except ShardError as error:
        raise SourceError(
            f"{meta.name}: {error} (parts are numbered by rank of the group, and ranks "
            f"{sorted(boxes)} hold one)"
        ) from error


def check_part(
    meta: TensorMeta, shard: LocalShard, part: Tensor | QuantizedTensor, *, quantized: bool
) -> None:
    """Raise SourceError unless a part has the shape of its box and the dtype of the metadata.

    quantized: it is to be; if it is in FP8 already, its box must have whole blocks alone.
    """
    in_fp8 = isinstance(part, QuantizedTensor)
    dtype = meta.dtype if isinstance(part, QuantizedTensor) else part.dtype
    if (tuple(part.shape), dtype) != (shard.box.shape, meta.dtype):
        raise SourceError(
            f"{meta.name}: this rank's part reads as {tuple(part.shape)} of {dtype}, and is "
            f"described as {shard.box.shape} of {meta.dtype}, at {list(shard.box.offset)} of "
            f"{list(meta.shape)}; describe the model again after it has changed"
        )
    sides = zip(
        shard.box.offset[-2:], shard.box.stop[-2:], meta.shape[-2:], BLOCK_SIZE, strict=False
    )
    if in_fp8 and quantized and any(a % b or (z % b and z != n) for a, z, n, b in sides):
        raise SourceError(
            f"{meta.name}: the trainer holds it in FP8, and its box from {list(shard.box.offset)} "
            f"to {list(shard.box.stop)} cuts through blocks of {BLOCK_SIZE}, which have other "
            "scales on the other side; cut it at multiples of a block, or keep BF16 weights"
        )
