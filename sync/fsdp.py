"""The shards of a model under FSDP2 (`fully_shard`), under the names of its checkpoint.

    Shard(d)                   cuts dimension d as torch.chunk, mesh dimension after mesh dimension
    _StridedShard(d)           TP and FSDP: cuts d after the tensor parallelism to its right
    Replicate (HSDP)           cuts nothing
    plain tensor or buffer     whole on every rank

Of ranks that hold the same, one sends it.

transformers 5 holds the experts of a layer in two parameters, where the checkpoint has a tensor for
each expert's projections. A table says which rows of an expert are which tensor: one entry is all
that another layout of experts needs. Local tensors are read as they are at each pass: on the
device where FSDP keeps them (CPU offload too), in the dtype that it shards, fp32 for fp32 masters.

Parameters are taken from ``state_dict``, which puts them back in their sharded form first; after a
forward alone the root's are whole. A tied head is left out, as in the checkpoint.

Source: torch 2.13, distributed/fsdp/_fully_shard and distributed/tensor/placement_types.py;
transformers 5.19, conversion_mapping.py ("qwen2_moe", "mixtral"). Left out: FSDP1, whose flat
parameters are no boxes; parameters of which a pipeline stage has some (every rank must have all).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from fp8rl.quant import Box
from fp8rl.sync.errors import SourceError
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import TensorMeta, hugging_face_name


@dataclass(frozen=True)
class Stacked:
    """The tensors of a checkpoint in a parameter [experts, rows, columns], one below the other.

    tensors: of each expert (* is its number), in equal parts of the rows.
    """

    tensors: tuple[str, ...]


# model_type of the config -> parameter of a layer's MLP -> what the checkpoint has of it
_RENAMED_OR_STACKED: Final[Mapping[str, Mapping[str, Stacked | str]]] = {
    "mixtral": {
        "mlp.experts.gate_up_proj": Stacked(
            ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight")
        ),
        "mlp.experts.down_proj": Stacked(("block_sparse_moe.experts.*.w2.weight",)),
        "mlp.gate.weight": "block_sparse_moe.gate.weight",
    }
}
_STACKED: Final[Mapping[str, Stacked | str]] = {
    "mlp.experts.gate_up_proj": Stacked(
        ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")
    ),
    "mlp.experts.down_proj": Stacked(("mlp.experts.*.down_proj.weight",)),
}


class FSDPSource(ShardedSource):
    """A ``WeightSource`` over a model under FSDP2, or under nothing at all."""

    def __init__(self, model: nn.Module, *, group: dist.ProcessGroup | None = None) -> None:
        """Describe the parameters and persistent buffers of `model`: a collective of all ranks.

        Args:
            model: a transformers model, or another whose names are those of its checkpoint; the
                prefixes of wrappers (torch.compile, activation checkpointing) do not matter.
            group: all trainer ranks; None is the default group, or this process alone.

        Raises:
            SourceError: the model is under FSDP1, or a parameter is placed in a way that this file
                does not know.
            RankLostError: a rank ended.
        """
        flat = [name for name, m in model.named_modules() if isinstance(m, FSDP1)]
        if flat:
            raise SourceError(
                f"{flat[0] or 'the model'} is under FSDP1 (FullyShardedDataParallel), whose flat "
                "parameters are cut anywhere; use FSDP2 (fully_shard), or an IterableSource of "
                "full tensors"
            )
        table = _RENAMED_OR_STACKED.get(_model_type(model), _STACKED)
        metadata: list[TensorMeta] = []
        shards: list[LocalShard] = []
        for name, tensor, read in _tensors(model):
            shape = tuple(tensor.shape)
            box: Box | None = Box((0,) * len(shape), shape)
            if isinstance(tensor, DTensor):
                box = local_box(name, tensor)
            for meta, shard in _in_checkpoint(name, tensor.dtype, shape, box, read, table):
                metadata.append(meta)
                shards += [] if shard is None else [shard]
        super().__init__(metadata, shards, group=group, replicas=True)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """Names, tensors and how to read what lies here of them, each tensor once."""
    owners = {}
    for module in model.modules():
        for leaf, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            owners[id(tensor)] = (module, leaf)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied to an earlier one
            continue
        seen.add(id(tensor))
        if isinstance(tensor, DTensor):  # FSDP keeps this object while the module has another
            yield hugging_face_name(name), tensor, partial(_local, tensor)
        elif id(tensor) in owners:  # by name: a buffer that is moved is a new one
            yield hugging_face_name(name), tensor, partial(getattr, *owners[id(tensor)])
        else:
            raise SourceError(
                f"{name}: is in the model's state_dict, and no parameter or buffer of a module; "
                "its weights cannot be read in place"
            )


@torch.no_grad()
def _local(tensor: DTensor) -> Tensor:
    local: Tensor = tensor.to_local()
    return local


def local_box(name: str, tensor: DTensor) -> Box | None:
    """Where this rank's part of a DTensor lies, or None where it has none.

    Raises SourceError for a placement whose geometry is not known here.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    strided = [i for i, p in enumerate(placements) if _is_strided(p)]
    plain = [i for i, p in enumerate(placements) if isinstance(p, Shard) and i not in strided]
    known = all(isinstance(p, Replicate | Shard) or _is_strided(p) for p in placements)
    if not known or any(not _after_all_others(tensor, i, plain, strided) for i in strided):
        raise SourceError(
            f"{name}: is placed as {placements} on a mesh of {tuple(mesh.shape)}; known are Shard, "
            "Replicate, and FSDP2's _StridedShard where tensor parallelism cuts the same dimension "
            "to the right of it in the mesh"
        )
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    for i in [*plain, *strided]:
        dim: int = placements[i].dim  # type: ignore[attr-defined]
        each = math.ceil(shape[dim] / mesh.size(i))
        start = min(coordinate[i] * each, shape[dim])
        offset[dim] += start
        shape[dim] = min(each, shape[dim] - start)
    found = tuple(tensor.to_local().shape)
    if found != tuple(shape):
        raise SourceError(
            f"{name}: this rank holds {found} of {tuple(tensor.shape)}, expected {tuple(shape)} of "
            f"{placements} at {coordinate} on a mesh of {tuple(mesh.shape)}"
        )
    return Box(tuple(offset), tuple(shape))


def _is_strided(placement: Placement) -> bool:
    """Whether it is FSDP2's mark for a dimension that tensor parallelism cuts first."""
    return type(placement).__name__ == "_StridedShard"


def _after_all_others(
    tensor: DTensor, i: int, plain: Sequence[int], strided: Sequence[int]
) -> bool:
    """Whether a strided placement cuts what all others on its dimension, to the right, left."""
    placements, mesh = tensor.placements, tensor.device_mesh
    dim, factor = placements[i].dim, placements[i].split_factor  # type: ignore[attr-defined]
    others = [j for j in [*plain, *strided] if j != i and placements[j].dim == dim]  # type: ignore[attr-defined]
    to_the_right = all(j > i and j not in strided for j in others)
    return to_the_right and factor == math.prod(mesh.size(j) for j in others)


def _in_checkpoint(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    box: Box | None,
    read: Callable[[], Tensor],
    table: Mapping[str, Stacked | str],
) -> Iterator[tuple[TensorMeta, LocalShard | None]]:
    """What the checkpoint has of a parameter, with this rank's part of each."""
    match = re.fullmatch(r"(.*\.layers\.\d+\.)(.*)", name)
    layer, leaf = match.groups() if match else ("", name)
    found = table.get(leaf) if layer else None
    if not isinstance(found, Stacked):
        name = name if found is None else layer + found
        shard = None if box is None else LocalShard(name, box, read)
        yield TensorMeta(name, dtype, shape), shard
        return
    experts, all_rows, columns = shape
    rows = all_rows // len(found.tensors)
    for expert in range(experts):
        for i, tensor in enumerate(found.tensors):
            name = layer + tensor.replace("*", str(expert))
            shard = None if box is None else _of_expert(name, box, read, expert, i * rows, rows)
            yield TensorMeta(name, dtype, (rows, columns)), shard


def _of_expert(
    name: str, box: Box, read: Callable[[], Tensor], expert: int, first: int, rows: int
) -> LocalShard | None:
    """The part of `rows` of an expert from `first` on that a box of stacked experts has."""
    low, high = max(box.offset[1], first), min(box.stop[1], first + rows)
    if not box.offset[0] <= expert < box.stop[0] or low >= high:
        return None
    here = slice(low - box.offset[1], high - box.offset[1])
    at = expert - box.offset[0]
    part = Box((low - first, box.offset[2]), (high - low, box.shape[2]))
    return LocalShard(name, part, lambda: read()[at, here])


def _model_type(model: nn.Module) -> str:
    """That of a transformers model's config."""
    for module in model.modules():
        found = getattr(getattr(module, "config", None), "model_type", None)
        if found is not None:
            return str(found)
    return ""
