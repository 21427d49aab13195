"""One small model and the ways in which four ranks hold it, for the tests of sharded sources."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8rl.quant import Box, QuantizedTensor, QuantPlan, ShardLayout, quantize_blockwise
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.source import TensorMeta
from tests.helpers import hf_config, weights

RANKS = 4
PLAN = QuantPlan.from_hf_config(hf_config(family="qwen2"))  # with biases
BF16_PLAN = QuantPlan.from_hf_config(hf_config(family="qwen2"), weights="bf16")
WEIGHTS = weights(seed=3, family="qwen2")
METADATA = [TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in WEIGHTS.items()]
OUT, GATE = (f"model.layers.1.{x}_proj.weight" for x in ("self_attn.o", "mlp.gate"))
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
Boxes = Sequence[Box | None]  # of the ranks of a group


def whole(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape))


def alone(at: int, shape: Sequence[int], ranks: int) -> Boxes:
    """One rank holds it all."""
    return [whole(shape) if rank == at else None for rank in range(ranks)]


def rows(shape: Sequence[int], ranks: int, dim: int = 0) -> Boxes:
    """Consecutive parts of a dimension, as torch.chunk; the last ranks may hold nothing."""
    dim = min(dim, len(shape) - 1)
    sizes = [len(part) for part in torch.arange(shape[dim]).chunk(ranks)]
    return split(shape, dim, [*sizes, *[0] * (ranks - len(sizes))])


def split(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> Boxes:
    if len(shape) > 1:
        return ShardLayout.split(tuple(shape), dim, sizes).boxes
    two = ShardLayout.split((*shape, 1), dim, sizes).boxes
    return [Box(box.offset[:1], box.shape[:1]) for box in two]


def grid(shape: Sequence[int], ranks: int) -> Boxes:
    """Four parts that meet in one point, within a block."""
    if len(shape) < 2:
        return alone(3, shape, ranks)
    (n, k), (row, column) = shape, (shape[0] * 2 // 5, shape[1] * 2 // 3)
    sides = [((0, row), (row, n - row)), ((0, column), (column, k - column))]
    return [Box((r, c), (h, w)) for r, h in sides[0] for c, w in sides[1]]


def anywhere(shape: Sequence[int], ranks: int, rng: random.Random) -> Boxes:
    """Cuts at any place of any dimension, or one holder."""
    if rng.random() < 0.3:
        return alone(rng.randrange(ranks), shape, ranks)
    dim = rng.randrange(len(shape))
    cuts = sorted(rng.randint(0, shape[dim]) for _ in range(ranks - 1))
    return split(shape, dim, [b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True)])


def layout(name: str, ranks: int = RANKS) -> dict[str, Boxes]:
    """The boxes of every tensor, by the name of a layout."""
    rng = random.Random(name)
    cut: dict[str, Callable[[int, Sequence[int]], Boxes]] = {
        "rows": lambda i, shape: rows(shape, ranks),
        "columns": lambda i, shape: rows(shape, ranks, dim=1),
        "grid": lambda i, shape: grid(shape, ranks),
        "pipeline": lambda i, shape: alone(i * ranks // len(METADATA), shape, ranks),
        "one rank": lambda i, shape: alone(2, shape, ranks),
    }
    make = cut.get(name, lambda i, shape: anywhere(shape, ranks, rng))
    return {meta.name: make(i, meta.shape) for i, meta in enumerate(METADATA)}


LAYOUTS = ["random 1", "pipeline", "rows", "columns", "grid", "one rank", "random 2", "random 3"]


def shards(
    boxes: dict[str, Boxes], rank: int, tensors: dict[str, Tensor] = WEIGHTS
) -> list[LocalShard]:
    """What a rank holds."""

    def reader(part: Tensor) -> Callable[[], Tensor]:
        return lambda: part

    return [
        LocalShard(name, box, reader(tensors[name][box.slices]))
        for name, of_ranks in boxes.items()
        for box in [of_ranks[rank]]
        if box is not None
    ]


def same(found: Tensor | QuantizedTensor, want: Tensor | QuantizedTensor) -> bool:
    """Equality bit for bit."""
    if isinstance(want, Tensor) or isinstance(found, Tensor):
        assert isinstance(found, Tensor) and isinstance(want, Tensor)
        return found.dtype == want.dtype and torch.equal(found, want)
    data = torch.equal(found.data.view(torch.uint8), want.data.view(torch.uint8))
    return data and torch.equal(found.scale_inv, want.scale_inv)


def gathered(plan: QuantPlan, tensors: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """What gathering first and encoding then gives."""
    return {
        entry.name: quantize_blockwise(tensors[entry.name], **options)
        if entry.quantized
        else tensors[entry.name].to(entry.dtype)
        for entry in plan.entries
    }


def wrong(found: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Names that are missing, extra, out of order or unequal."""
    if list(found) != list(want):
        return ["names or their order"]
    return [name for name in want if not same(found[name], want[name])]


def aligned() -> dict[str, Boxes]:
    """Rows cut at the borders of blocks."""
    sizes = {128: [128, 0, 0, 0], 256: [128, 0, 128, 0], 512: [128, 256, 0, 128]}
    return {
        meta.name: split(meta.shape, 0, sizes.get(meta.shape[0], [meta.shape[0], 0, 0, 0]))
        for meta in METADATA
    }
