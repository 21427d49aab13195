"""A model whose tensors lie in parts on the trainer's ranks, moved to where they are published.

    read -> quantize where it lies -> one message to each destination -> whole tensors there

What a trainer's layout is, the shards say (``local_shard.py``); here is the one place that moves
them. A quantized weight leaves its rank as FP8, and a block that a cut goes through has the scale
of the whole (``quant/sharded.py``): what arrives equals gathering first and quantizing then, bit
for bit, for half the bytes. Each part goes from the rank that holds it to each destination, point
to point; nothing is gathered elsewhere or passed along a pipeline.

The work goes in buckets of consecutive tensors (``shard_pass.py``), so that a rank needs about one
on top of the model: its parts as FP8, and again in the message. Every rank passes through all
buckets in step, and what stops one of them stops all, at once.

Left out: tensors of which a rank holds two boxes; flat parts (FSDP1, a distributed optimizer's).
Buckets do not overlap: while a destination uses one, the others quantize the next and wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from fp8rl.quant import Box, FP32Source, QuantizedTensor, QuantPlan
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.rounded import moving_dtypes
from fp8rl.sync.shard_checks import by_number, check_tiles
from fp8rl.sync.shard_pass import Holdings, Pass
from fp8rl.sync.source import TensorMeta, planned_dtypes, refuse_destinations
from fp8rl.sync.trainer_ranks import TrainerRanks


class ShardedSource:
    """A ``WeightSource`` over what every rank of a group holds of a model."""

    def __init__(
        self,
        metadata: Sequence[TensorMeta],
        shards: Sequence[LocalShard],
        *,
        group: dist.ProcessGroup | None = None,
        replicas: bool = False,
    ) -> None:
        """Find out who holds what: a collective of all ranks of `group`.

        Args:
            metadata: every tensor of the model in the trainer's dtype, equal on all ranks.
            shards: what this rank holds, at most one box of each tensor.
            group: all trainer ranks; None is the default group, or this process alone where
                torch.distributed is not initialized.
            replicas: whether ranks may describe the same box of a tensor; one of them sends it.

        Raises, on every rank:
            SourceError: a shard has no place in the metadata, boxes overlap or leave a gap (with
                tensor and ranks), or the ranks' metadata differ.
            RankLostError: a rank ended.
        """
        self._ranks = ranks = TrainerRanks(group)
        ranks.same([f"{meta.name}: {meta.dtype} {meta.shape}" for meta in metadata])
        with ranks.telling():
            mine = by_number(metadata, shards)
        ranks.agree()
        boxes: list[dict[int, Box]] = [{} for _ in metadata]
        text = json.dumps([[i, shard.box.offset, shard.box.shape] for i, shard in mine.items()])
        for rank, theirs in enumerate(ranks.gather(text)):
            for i, offset, shape in json.loads(theirs):
                boxes[i][rank] = Box(tuple(offset), tuple(shape))
        if replicas:
            boxes = [_one_of_each(held, i) for i, held in enumerate(boxes)]
            mine = {i: shard for i, shard in mine.items() if ranks.rank in boxes[i]}
        for meta, held in zip(metadata, boxes, strict=True):
            check_tiles(meta, held)
        self._held = Holdings(ranks.size, tuple(metadata), boxes, mine)

    @property
    def ranks(self) -> TrainerRanks:
        """The trainer's ranks, who pass over the source in step."""
        return self._ranks

    @property
    def wire_bytes(self) -> int:
        """Bytes of weights that this rank has sent so far."""
        return self._ranks.sent

    def metadata(self) -> list[TensorMeta]:
        """Name, the trainer's dtype and whole shape of every tensor, in order; moves nothing."""
        return list(self._held.metadata)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, whole tensor)`` on every rank, in the trainer's own dtype: a collective.

        Raises as `encoded`, but NaN and Inf pass.
        """
        dtypes = [meta.dtype for meta in self._held.metadata]
        everyone = range(self._ranks.size)
        unchecked = Pass(self._held, self._ranks, dtypes, dtypes, everyone, None, "pow2", False)
        for name, tensor in unchecked.run():
            assert isinstance(tensor, Tensor)  # none of these dtypes stands for quantized
            yield name, tensor

    def encoded(
        self, plan: QuantPlan, *, to: Sequence[int], fp32_as: FP32Source | None = None
    ) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
        """Yield every tensor as the plan has it, on the ranks `to`: a collective of all ranks.

        Quantized weights are yielded as ``QuantizedTensor``, others in the plan's dtype, in order
        of the metadata. On other ranks nothing is yielded, but the iterator must be run to its end.
        Tensors lie on the device of the group's backend (in a process alone: where the trainer has
        them) and may be views of live parameters: use them before the next update. A destination
        that leaves its loop must close the iterator (``contextlib.closing``) for others to know.

        Args:
            plan: made from the config of the same model.
            to: destinations, as ranks of the group.
            fp32_as: what fp32 weights stand for, as in `quantize_blockwise`.

        Raises, on every rank:
            SourceError: plan and metadata differ, a shard reads otherwise than described, ranks
                call with other arguments, or another rank broke off, be it in the loop over what
                is yielded there.
            NonFiniteWeightError: a tensor holds NaN or Inf.
            RankLostError: a rank ended.
        """
        ranks = self._ranks
        with ranks.telling():
            refuse_destinations(to, ranks.size)
            dtypes = planned_dtypes(self._held.metadata, plan, fp32_as)
            forms = moving_dtypes([meta.name for meta in self._held.metadata], plan)
        ranks.agree()
        named = zip(self._held.metadata, forms, strict=True)
        choices = f"to={list(to)}, fp32_as={fp32_as}, scale_format={plan.scale_format}"
        ranks.same([choices, *(f"{m.name}: {d}" for m, d in named)])
        moving = Pass(self._held, ranks, forms, dtypes, to, fp32_as, plan.scale_format, True)
        yield from moving.run()


def _one_of_each(boxes: Mapping[int, Box], turn: int) -> dict[int, Box]:
    """Leave each box to one of the ranks that have it, in turn."""
    holders: dict[Box, list[int]] = {}
    for rank, box in boxes.items():
        holders.setdefault(box, []).append(rank)
    return {ranks[turn % len(ranks)]: box for box, ranks in holders.items()}
