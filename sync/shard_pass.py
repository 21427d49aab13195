"""One pass over a sharded model: encode, move and join, a bucket of tensors at a time.

On every rank, for each bucket:

    read       this rank's parts, encoded as far as that needs no other rank
    agree      a NaN, or a part that cannot be read, ends the pass on all ranks here
    quantize   weights cut over ranks, together with the ranks that hold the rest
    pack       one message of all parts, and room for those of others
    agree
    move       point to point, to each destination
    yield      the whole tensors, on destinations alone

A rank that breaks off in between tells the others in their next ``agree`` (``trainer_ranks.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp8rl.quant import (
    Box,
    FP32Source,
    NonFiniteWeightError,
    QuantizedTensor,
    ScaleFormat,
    ShardLayout,
    WeightShard,
    dequantize_blockwise,
    quantize_shards,
)
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.encode import encode
from fp8rl.sync.errors import SourceError
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.rounded import arrived
from fp8rl.sync.shard_checks import check_part
from fp8rl.sync.shard_messages import Plane, joined, message_bytes, pack, planes, unpack
from fp8rl.sync.source import TensorMeta
from fp8rl.sync.trainer_ranks import NonFinite, TrainerRanks

BUCKET_BYTES: Final = 256 * 2**20  # of BF16


@dataclass(frozen=True)
class Holdings:
    """Who holds what. Tensors go by their number in the metadata.

    ranks: of the group. boxes: for each tensor, rank -> its part, without empty ones. shards: this
    rank's.
    """

    ranks: int
    metadata: Sequence[TensorMeta]
    boxes: Sequence[Mapping[int, Box]]
    shards: Mapping[int, LocalShard]

    def buckets(self) -> Iterator[range]:
        """Runs of tensors of at most BUCKET_BYTES in BF16, or of one."""
        start, nbytes = 0, 0
        for i, meta in enumerate(self.metadata):
            here = 2 * torch.Size(meta.shape).numel()
            if i > start and nbytes + here > BUCKET_BYTES:
                yield range(start, i)
                start, nbytes = i, 0
            nbytes += here
        if self.metadata:
            yield range(start, len(self.metadata))

    def layout(self, i: int) -> ShardLayout:
        """Return the boxes of all ranks, empty where they hold nothing."""
        shape = self.metadata[i].shape
        empty = Box((0,) * len(shape), (0,) * len(shape))
        boxes = self.boxes[i]
        return ShardLayout(shape, tuple(boxes.get(rank, empty) for rank in range(self.ranks)))

    def planes(self, i: int, rank: int, form: torch.dtype) -> list[Plane]:
        """Return what moves of a rank's part of a tensor."""
        return planes(self.metadata[i].shape, form, self.boxes[i][rank])


@dataclass(frozen=True)
class Pass:
    """What to do with every tensor, the same on all ranks.

    forms: the dtype in which each tensor moves; E4M3: it is quantized. sent: that in which it is
    yielded. to: destinations.
    checked: whether NaN and Inf are refused in tensors that are not quantized.
    """

    held: Holdings
    ranks: TrainerRanks
    forms: Sequence[torch.dtype]
    sent: Sequence[torch.dtype]
    to: Sequence[int]
    fp32_as: FP32Source | None
    scale_format: ScaleFormat
    checked: bool

    def run(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yield whole tensors on the destinations."""
        for numbers in self.held.buckets():
            yield from _Bucket(self, numbers).run()
        self.ranks.agree()  # that all destinations have had the last bucket

    def together(self, i: int) -> bool:
        """Whether a weight is to be quantized by several ranks."""
        return self.forms[i] == FP8_DTYPE and len(self.held.boxes[i]) > 1


class _Bucket:
    """Consecutive tensors on their way.

    ready: planes of this rank's parts. raw: its parts of weights to be quantized together.
    """

    def __init__(self, moving: Pass, numbers: range) -> None:
        self._pass, self._held, self._ranks = moving, moving.held, moving.ranks
        self._numbers = numbers
        self._ready: dict[int, list[Tensor]] = {}
        self._raw: dict[int, Tensor] = {}
        self._non_finite: list[NonFinite] = []
        self._received: dict[int, Tensor] = {}

    def run(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Do all that the top of this file lists."""
        ranks = self._ranks
        with ranks.telling():
            for i in self._numbers:
                if i in self._held.shards:
                    self._read(i, self._held.shards[i])
        fp8 = ranks.agree(
            non_finite=self._non_finite,
            on_cuda=self._on_cuda(),
            met=any(self._pass.together(i) for i in self._ready),
        )
        self._quantize_together(self._already_fp8() if fp8 else ())
        with ranks.telling():
            sends = self._pack()
        ranks.agree()
        ranks.move(sends, self._received)
        del sends
        if ranks.rank in self._pass.to:
            with ranks.telling():
                yield from self._wholes()

    def _read(self, i: int, shard: LocalShard) -> None:
        """Read a part and encode it, unless that needs the other ranks."""
        form, meta = self._pass.forms[i], self._held.metadata[i]
        part = shard.read()
        check_part(meta, shard, part, quantized=form == FP8_DTYPE)
        if isinstance(part, Tensor):
            part = part.detach()
            if self._ranks.on_cuda:
                part = part.to("cuda")  # parts that were offloaded are encoded there
            if self._pass.together(i):
                self._raw[i] = part
                return
        if not self._pass.checked:  # then `form` is the trainer's own
            whole = part if isinstance(part, Tensor) else dequantize_blockwise(part, form)
            self._ready[i] = [whole]
            return
        try:
            ready = encode(meta.name, part, form, self._pass.fp32_as, self._pass.scale_format)
        except NonFiniteWeightError as error:
            first = [a + b for a, b in zip(error.first_index, shard.box.offset, strict=True)]
            self._non_finite.append(NonFinite(i, meta.name, error.count, first, error.found))
            return
        if isinstance(ready, QuantizedTensor):
            self._ready[i] = [ready.data, ready.scale_inv]
        else:
            self._ready[i] = [ready]

    def _on_cuda(self) -> bool:
        planes = (tensor for tensors in self._ready.values() for tensor in tensors)
        return any(tensor.is_cuda for tensor in itertools.chain(self._raw.values(), planes))

    def _already_fp8(self) -> set[int]:
        """Weights on several ranks that hold them in FP8: a collective."""
        shared = [i for i in self._numbers if self._pass.together(i)]
        fp8 = self._ranks.largest([i in self._ready for i in shared])
        raw = self._ranks.largest([i in self._raw for i in shared])
        for i, *both in zip(shared, fp8, raw, strict=True):
            if all(both):
                raise SourceError(
                    f"{self._held.metadata[i].name}: some ranks hold their part in FP8, others "
                    f"in {self._held.metadata[i].dtype}; all must hold it in one format"
                )
        return {i for i, yes in zip(shared, fp8, strict=True) if yes}

    def _quantize_together(self, already: Container[int]) -> None:
        """Quantize what several ranks hold: a collective, where there is any."""
        numbers = [i for i in self._numbers if self._pass.together(i) and i not in already]
        if not numbers:
            return
        weights = []
        for i in numbers:
            meta, layout = self._held.metadata[i], self._held.layout(i)
            here = self._raw.pop(i, None)
            if here is None:
                empty = layout.boxes[self._ranks.rank].shape
                here = torch.empty(empty, dtype=meta.dtype, device=self._ranks.device)
            weights.append(WeightShard(meta.name, here, layout))
        with self._ranks.losses():
            quantized = quantize_shards(
                weights,
                group=self._ranks.peers.group,
                scale_format=self._pass.scale_format,
                fp32_as=self._pass.fp32_as,
            )
        for i, q in zip(numbers, quantized, strict=True):
            if not q.box.empty:
                self._ready[i] = [q.data, q.scale_inv]

    def _pack(self) -> list[tuple[int, Tensor]]:
        """Write the message to every other destination, and make room for those to this rank."""
        ranks, to = self._ranks, self._pass.to
        if ranks.rank in to:
            for rank in range(ranks.size):
                nbytes = message_bytes(p for _, each in self._planes(rank) for p in each)
                if nbytes and rank != ranks.rank:
                    room = torch.empty(nbytes, dtype=torch.uint8, device=ranks.device)
                    self._received[rank] = room
        others = [rank for rank in to if rank != ranks.rank]
        if not (others and self._ready):
            return []
        mine = self._planes(ranks.rank)
        message = pack(
            [p for _, each in mine for p in each],
            [tensor for i, _ in mine for tensor in self._ready[i]],
            ranks.device,
        )
        if ranks.rank not in to:
            self._ready.clear()
        return [(rank, message) for rank in others]

    def _planes(self, rank: int) -> list[tuple[int, list[Plane]]]:
        """What a rank has of this bucket."""
        forms, held = self._pass.forms, self._held
        numbers = [i for i in self._numbers if rank in held.boxes[i]]
        return [(i, held.planes(i, rank, forms[i])) for i in numbers]

    def _wholes(self) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Join the parts of every tensor and yield it."""
        found = {self._ranks.rank: self._ready}
        for rank, message in self._received.items():
            theirs = self._planes(rank)
            views = iter(unpack([p for _, each in theirs for p in each], message))
            found[rank] = {i: [next(views) for _ in each] for i, each in theirs}
        for i in self._numbers:
            meta, form = self._held.metadata[i], self._pass.forms[i]
            parts = [
                (self._held.planes(i, rank, form), found[rank].pop(i))
                for rank in self._held.boxes[i]
            ]
            tensors = joined(meta.shape, form, parts, self._ranks.device)
            if form == FP8_DTYPE:
                data, scale_inv = tensors
                scale_format = self._pass.scale_format
                quantized = QuantizedTensor(data, scale_inv, BLOCK_SIZE, scale_format)
                yield meta.name, arrived(quantized, self._pass.sent[i])
            else:
                yield meta.name, tensors[0]
