"""Which tensors a live vLLM model takes, by which name, and where each of them lies on this worker.

Names are those of a Hugging Face checkpoint and shapes those of whole tensors, both equal on every
worker of a tensor-parallel engine; the box says what of the whole this worker holds. All of it is
read off the model's own modules, not off what a trainer believes:

    fused linears        parted by the table with which the model's loader joins them
                         (``hf_to_vllm_mapper.orig_to_new_stacked``), in its order
    column-parallel      rows divided by rank; heads of k and v, where there are fewer than ranks,
                         held by several
    row-parallel         columns divided by rank, the bias whole
    embedding and head   rows divided by rank after padding; a tied head has no tensor of its own
    experts              one module a layer, named by its own ``get_expert_mapping``; w13 holds gate
                         and up, each divided by rank, w2 is divided along its columns
    all else             whole parameters as they lie; with several ranks, only RMSNorm's

A *unit* is what is loaded together: one vLLM module, all its tensors. What this file does not know
is refused by name before anything is loaded.

Left out: pipeline-parallel engines, redundant experts (EPLB), multi-latent attention (whose kernels
hold products of weights), scales of another block size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer

from fp8rl.quant import QKV, EngineTensor
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.shard_layout import Box
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape
from fp8rl.sync.admission import shown
from fp8rl.sync.engine_scales import has_fp8_cache
from fp8rl.sync.errors import ManifestError

SCALE = "weight_scale_inv"
LINEARS = (
    ColumnParallelLinear,
    GateLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
EMBEDDINGS = (VocabParallelEmbedding, ParallelLMHead)


@dataclass(frozen=True)
class Place:
    """One tensor of the checkpoint, and where this worker keeps its part of it.

    name, dtype, shape: of the whole tensor, as it is sent. box: this worker's part of it; empty
    where another worker holds it. parameter: the module's attribute that it goes into. at: the
    index of the part in that parameter (a slice of rows, after an expert's number), in the layout
    before a kernel re-lays it out.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    parameter: str
    at: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """A vLLM module and the tensors that are loaded into it together.

    tied: other modules that compute with its weight, and hold kernels of their own made of it.
    """

    prefix: str
    module: Any
    places: tuple[Place, ...]
    tied: tuple[Any, ...] = ()


def expected_tensors(model: nn.Module) -> list[EngineTensor]:
    """List every tensor that the engine takes, whole: weights, then KV scales.

    Raises:
        ManifestError: the model holds a layer that this version cannot update (named).
    """
    weights = [
        EngineTensor(place.name, place.dtype, place.shape)
        for unit in engine_units(model)
        for place in unit.places
    ]
    scales = [
        EngineTensor(f"{prefix}.{x}_scale", torch.float32, (1,))
        for prefix, module in model.named_modules()
        if has_fp8_cache(module)
        for x in QKV
    ]
    return weights + scales


def units(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name what is loaded together: vLLM module -> its tensors; each weight is in exactly one.

    Raises ManifestError as ``expected_tensors`` does.
    """
    return {unit.prefix: tuple(place.name for place in unit.places) for unit in engine_units(model)}


def units_of(model: nn.Module, names: Collection[str]) -> list[Unit]:
    """The units that ``names`` make up, in the model's order.

    Raises:
        ManifestError: a name that no unit has, or a unit of which a part is missing.
    """
    given, chosen = set(names), []
    for unit in engine_units(model):
        missing = [place.name for place in unit.places if place.name not in given]
        if len(missing) == len(unit.places):
            continue
        if missing:
            raise ManifestError(
                f"{unit.prefix} is loaded as one, but {shown(missing)} did not come with the rest"
            )
        chosen.append(unit)
        given.difference_update(place.name for place in unit.places)
    if given:
        raise ManifestError(f"the engine's model has no {shown(sorted(given))}")
    return chosen


def engine_units(model: nn.Module) -> list[Unit]:
    """Every unit of the model, in its order. Raises ManifestError for a layer that is not known."""
    tied = _tied(model)
    found = []
    for prefix, module in model.named_modules():
        if module in tied:
            continue
        places = tuple(_places(model, prefix, module))
        if places:
            sharing = tuple(m for m, owner in tied.items() if owner is module)
            found.append(Unit(prefix, module, places, sharing))
    return found


def _tied(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Embeddings and heads whose weight is another's -> that one."""
    first: dict[int, nn.Module] = {}
    tied = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            owner = first.setdefault(id(module.weight), module)
            if owner is not module:
                tied[module] = owner
    return tied


def _places(model: nn.Module, prefix: str, module: nn.Module) -> Iterator[Place]:
    """This worker's places in one module, not in those below it."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, LinearBase):
        _refuse(prefix, module, LINEARS, own - {"weight", SCALE, "bias"})
        yield from _linear(model, prefix, module)
    elif isinstance(module, VocabParallelEmbedding):
        added = {"added vocabulary"} if module.num_added_embeddings else set()
        _refuse(prefix, module, EMBEDDINGS, (own - {"weight"}) | added)
        yield _embedding(prefix, module)
    elif isinstance(module, RoutedExperts):
        _refuse(prefix, module, (RoutedExperts,), own - _expert_parameters(module))
        yield from _experts(prefix, module)
    elif isinstance(module, AttentionLayerBase):
        _refuse(prefix, module, (Attention,), own)
    elif isinstance(module, PPMissingLayer):
        raise ManifestError(f"{prefix} is on another worker: pipeline parallelism is not supported")
    else:
        if own and get_tensor_model_parallel_world_size() > 1:
            _refuse(prefix, module, (RMSNorm,), set())
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            whole = Box((0,) * len(shape), shape)
            yield Place(f"{prefix}.{name}", parameter.dtype, shape, whole, name, ())


def _refuse(
    prefix: str, module: nn.Module, known: tuple[type, ...], unknown: Collection[str]
) -> None:
    """Refuse a module of another class than those known, or with parameters that are not."""
    if type(module) not in known:
        raise ManifestError(
            f"{prefix} is a {type(module).__name__}, which fp8rl cannot update; it knows "
            f"{', '.join(kind.__name__ for kind in known)}"
        )
    if unknown:
        raise ManifestError(
            f"{prefix} ({type(module).__name__}) holds {', '.join(sorted(unknown))}, which fp8rl "
            "cannot update; start the engine with blockwise FP8 or BF16 weights and without LoRA"
        )


def _leaves(model: nn.Module, prefix: str, module: LinearBase) -> list[str]:
    """The checkpoint's names of the parts of a linear, in their order there."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    stacked = mapper.orig_to_new_stacked if mapper is not None else {}
    parts = [
        prefix.removesuffix(joined) + part
        for part, (joined, _) in stacked.items()
        if prefix.endswith(joined)
    ] or [prefix]
    count = len(module.output_partition_sizes)
    if len(parts) != count:
        raise ManifestError(
            f"{prefix} has {count} parts, but by the model's own table it is made of {parts}"
        )
    return parts


def _linear(model: nn.Module, prefix: str, module: LinearBase) -> Iterator[Place]:
    columns = width = module.input_size
    left = 0
    if isinstance(module, RowParallelLinear):
        width = module.input_size_per_partition
        left = module.tp_rank * width
    fp8 = _has_fp8(prefix, module, module.weight)
    start = 0
    for index, leaf in enumerate(_leaves(model, prefix, module)):
        size = module.output_partition_sizes[index]
        rows, first = _rows(module, index, size)
        box, at = Box((first, left), (size, width)), slice(start, start + size)
        dtype = module.weight.dtype
        yield Place(f"{leaf}.weight", dtype, (rows, columns), box, "weight", (at,))
        if fp8:
            shape = scale_shape((rows, columns), BLOCK_SIZE)
            blocks = slice(at.start // BLOCK_SIZE[0], -(-at.stop // BLOCK_SIZE[0]))
            yield Place(
                f"{leaf}.{SCALE}", torch.float32, shape, box.blocks(BLOCK_SIZE), SCALE, (blocks,)
            )
        if module.bias is not None:
            part = Box((first,), (size,))
            yield Place(f"{leaf}.bias", module.params_dtype, (rows,), part, "bias", (at,))
        start += size


def _has_fp8(prefix: str, module: Any, weight: torch.Tensor) -> bool:
    """Whether a module takes FP8 weights; refuses those with other blocks than are sent."""
    if weight.dtype != FP8_DTYPE:
        return False
    found = module.weight_block_size
    if found is None or tuple(found) != BLOCK_SIZE:
        raise ManifestError(
            f"{prefix} takes FP8 weights with scales for blocks of {found}; fp8rl sends blocks of "
            f"{list(BLOCK_SIZE)}"
        )
    return True


def _rows(module: LinearBase, index: int, size: int) -> tuple[int, int]:
    """Of part ``index``, with ``size`` rows here: how many in all, and which is the first here."""
    if not isinstance(module, ColumnParallelLinear):
        return size, 0
    replicated = isinstance(module, QKVParallelLinear) and index > 0
    copies = module.num_kv_head_replicas if replicated else 1
    return size * module.tp_size // copies, module.tp_rank // copies * size


def _embedding(prefix: str, module: VocabParallelEmbedding) -> Place:
    first = module.shard_indices.org_vocab_start_index
    rows = module.shard_indices.org_vocab_end_index - first
    shape, width = (module.org_vocab_size, module.embedding_dim), module.embedding_dim
    box = Box((first, 0), (rows, width))
    return Place(f"{prefix}.weight", module.weight.dtype, shape, box, "weight", (slice(rows),))


def _expert_parameters(module: RoutedExperts) -> set[str]:
    weights = {"w13_weight", "w2_weight"}
    if getattr(module.quant_method, "weight_scale_refine", None) is not None:
        return weights  # scales of smaller blocks than were sent: refused with their names
    return weights | {"w13_weight_scale_inv", "w2_weight_scale_inv"}


def _experts(prefix: str, module: RoutedExperts) -> Iterator[Place]:
    """The experts of a layer; those that live on another worker get an empty box."""
    config = module.moe_config
    if config.num_experts != config.num_logical_experts:
        raise ManifestError(f"{prefix} has redundant experts, which fp8rl cannot update")
    ranks, rank = config.moe_parallel_config.tp_size, config.tp_rank
    hidden, inner = config.hidden_dim_unpadded, config.intermediate_size_per_partition_unpadded
    fp8 = _has_fp8(prefix, module, module.w13_weight)
    stem = module.layer_name.removesuffix("experts")
    for parameter, name, expert, shard in module.get_expert_mapping():
        here = module.expert_map_manager.map_global_to_local(expert)
        attribute = parameter.removeprefix("experts.") + "weight"
        if shard == "w2":
            shape, part = (hidden, ranks * inner), Box((0, rank * inner), (hidden, inner))
            rows = slice(hidden)
        else:
            shape, part = (ranks * inner, hidden), Box((rank * inner, 0), (inner, hidden))
            rows = slice(inner) if shard == "w1" else slice(inner, 2 * inner)
        box = part if here >= 0 else Box((0, 0), (0, 0))
        dtype = module.w13_weight.dtype
        yield Place(f"{stem}{name}weight", dtype, shape, box, attribute, (here, rows))
        if fp8:
            size = BLOCK_SIZE[0]
            blocks = slice((rows.start or 0) // size, -(-rows.stop // size))
            scales = scale_shape(shape, BLOCK_SIZE)
            yield Place(
                f"{stem}{name}{SCALE}",
                torch.float32,
                scales,
                box.blocks(BLOCK_SIZE),
                f"{attribute}_scale_inv",
                (here, blocks),
            )
