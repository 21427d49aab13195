"""Weights of a megatron-core GPTModel under Hugging Face names, each part where it lies.

    parameter --(megatron_table: row, split)--> boxes of its tensors --(sharded_source)--> engine

A description of what this rank holds, and nothing that moves: under tensor, pipeline (also
interleaved), expert, expert-tensor and data parallelism, dense and MoE layers, local layers and
Transformer Engine's. What a rank holds of a tensor is a view of the parameter, but for q, k and v,
whose rows lie in turns and are copied, one tensor at a time.

Names, shapes and the vocabulary without its padding come from the model's Hugging Face config, for
Megatron's own does not tell Mixtral from Qwen3-MoE; that the two are of one model is checked by
every parameter's shape, and that nothing is missing by all ranks together. Left out: what
``megatron_table.py`` leaves out, and Megatron-FSDP, whose parameters are no boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8rl.quant import QuantizedTensor, TrainerLinear
from fp8rl.sync.errors import SourceError
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.megatron_fp8 import fp8_part, holds_fp8
from fp8rl.sync.megatron_layout import Held, Layout, Part, layout_of, model_chunks
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import TensorMeta
from fp8rl.sync.trainer_ranks import TrainerRanks


class MegatronSource(ShardedSource):
    """A ``WeightSource`` over the GPTModel of every trainer rank, or the list of its chunks.

    Wrappers (DDP, Float16Module) may stay on; parameters must stay the same objects. What is
    yielded may be a view of a live parameter: use it before the next update.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        hf_config: Mapping[str, Any],
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Find out who holds what: a collective of all trainer ranks.

        hf_config: the model's config.json as a mapping. group: all trainer ranks; None: the default
        group, or this process alone where torch.distributed is not initialized.

        Raises, on every rank:
            SourceError: a parameter that has no place in such a checkpoint, or not its shape or
                dtype; a tensor that the ranks do not hold, or not all of; settings or kinds of
                parameters that cannot be exported.
            QuantPlanError: the config is of no known architecture.
        """
        self._chunks = model_chunks(model)
        ranks = TrainerRanks(group)
        with ranks.telling():
            layout = layout_of(self._chunks, hf_config)
            shards = _shards(layout)
        ranks.agree()
        self._layout = layout
        metadata = [TensorMeta(t.name, t.dtype, t.shape) for t in layout.tensors]
        super().__init__(metadata, shards, group=group)

    def linears(self) -> list[TrainerLinear]:
        """Return this rank's decoder linears, for ``fake_quantize``; moves nothing.

        Each with the rows of its (shard of) Hugging Face tensors.

        Raises:
            SourceError: experts that share a module, of which none is a linear of its own.
        """
        owners = {
            id(parameter): module
            for chunk in self._chunks
            for module in chunk.modules()
            for parameter in module.parameters(recurse=False)
        }
        found = []
        for held in self._layout.held:
            if len(held.shape) != 2 or not held.name.startswith("decoder."):
                continue
            if not held.name.endswith(".weight"):
                raise SourceError(
                    f"parameter {held.name!r} is one of several experts' in one module, which "
                    "fake quantization does not reach; build the model with SequentialMLP"
                )
            rows = {part.name: _rows(held, part) for part in held.parts}
            found.append(TrainerLinear(owners[id(held.parameter)], rows))
        return found


def _shards(layout: Layout) -> list[LocalShard]:
    """What this rank exports."""
    shards = []
    for held in layout.held:
        read = _read_fp8 if holds_fp8(held) else _read
        if held.speaks:
            shards += [LocalShard(p.name, p.box, partial(read, held, p)) for p in held.parts]
    return shards


def _read(held: Held, part: Part) -> Tensor:
    """A view of the part where it is one run, otherwise a copy."""
    matrix = held.matrix()
    runs = [matrix.narrow(part.dim, first, size) for first, size in part.runs]
    whole = runs[0] if len(runs) == 1 else torch.cat(runs, part.dim)
    return whole.to(held.dtype)  # no-op but for an expert bias, see megatron_load.py


def _read_fp8(held: Held, part: Part) -> QuantizedTensor:
    return fp8_part(held, part.dim, part.runs)


def _rows(held: Held, part: Part) -> Tensor:
    """The rows of a matrix that are a part of one tensor, in the tensor's order."""
    if part.dim == 1:
        return torch.arange(held.shape[0])
    return torch.cat([torch.arange(first, first + size) for first, size in part.runs])
