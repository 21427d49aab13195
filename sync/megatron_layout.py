"""What of each Hugging Face tensor a trainer rank holds, and where in which Megatron parameter.

The rows of ``megatron_table.py`` applied to the parameters that are here, by global numbers of
layers and experts. What does not fit (a parameter without a row or of another shape or dtype, a
setting that changes a meaning) is an error with its name. Whether all ranks together hold every
tensor is found out in ``sharded_source.py``.

Several ranks may hold the same: those of data and context parallelism; of what is not cut, those of
tensor parallelism; of a tied embedding, the last stage. The first of them speaks for it. What pads
the distributed optimizer lies in its flat buffers, of which the parameters are views.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8rl.quant.architectures import CheckpointTensor, checkpoint_tensors
from fp8rl.quant.shard_layout import Box
from fp8rl.sync.errors import SourceError
from fp8rl.sync.megatron_table import LAYER, OUTSIDE, REFUSED, Rule

HEAD: Final = "output_layer.weight"
_LAYER_NAME: Final = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Part:
    """A box of a tensor; runs: the (first, size) of a matrix along `dim` that make it up."""

    name: str
    box: Box
    dim: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter of this rank, or the matrix of one expert in it.

    shape: of the matrix (or vector) as Hugging Face orients it. stacked: (expert, experts) where
    the parameter holds several. speaks: whether this rank exports it, or another with the same.
    """

    name: str
    parameter: Tensor
    shape: tuple[int, ...]
    stacked: tuple[int, int] | None
    dtype: torch.dtype
    parts: tuple[Part, ...]
    speaks: bool

    def matrix(self) -> Tensor:
        """Return a view of what the parameter holds now."""
        whole = self.parameter.detach()
        if self.stacked is None:
            return whole
        expert, experts = self.stacked
        return whole.view(experts, *reversed(self.shape))[expert].T


@dataclass(frozen=True)
class Layout:
    """Every tensor of the model, in checkpoint order and the trainer's dtype, and what is here."""

    tensors: tuple[CheckpointTensor, ...]
    held: tuple[Held, ...]


def model_chunks(model: nn.Module | Sequence[nn.Module]) -> list[Any]:
    """Return the GPTModels of a model or its chunks, without wrappers (DDP, Float16Module)."""
    chunks: list[Any] = [model] if isinstance(model, nn.Module) else list(model)
    for i, chunk in enumerate(chunks):
        while hasattr(chunk, "module"):
            chunk = chunk.module
        chunks[i] = chunk
    return chunks


def global_parameters(model: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Return this rank's parameters under names with global (not stage-local) layer numbers."""
    return {
        _global_name(chunk, name): parameter
        for chunk in model_chunks(model)
        for name, parameter in chunk.named_parameters()
    }


def layout_of(model: nn.Module | Sequence[nn.Module], hf_config: Mapping[str, Any]) -> Layout:
    """Place every parameter of this rank in the checkpoint that `hf_config` describes.

    model: GPTModel or the list of its chunks, wrapped or not. hf_config: config.json as a mapping.

    Raises:
        SourceError: a parameter has no place in that checkpoint, or not the shape or dtype for it;
            the model is built with settings that the table does not know.
        QuantPlanError: `hf_config` is of no known architecture.
    """
    chunks = model_chunks(model)
    for chunk in chunks:
        _check_settings(chunk, hf_config)
    config = chunks[0].config
    tensors = [
        t if t.dtype == torch.float32 else t._replace(dtype=config.params_dtype)
        for t in checkpoint_tensors(hf_config)
    ]
    known = {t.name: t for t in tensors}
    rules = LAYER[hf_config["architectures"][0]]
    held = [
        one
        for chunk in chunks
        for name, parameter in _weights(chunk)
        for one in _placed(_Parameter(chunk, name, parameter, rules), known)
    ]
    return Layout(tuple(tensors), tuple(held))


def _weights(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters by global name, and the routers' expert biases, which are buffers."""
    for name, parameter in chunk.named_parameters():
        yield _global_name(chunk, name), parameter
    for name, buffer in chunk.named_buffers():
        if name.endswith(".expert_bias"):
            yield _global_name(chunk, name), buffer


def _global_name(chunk: Any, name: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1  # Megatron counts from 1
    return f"decoder.layers.{layer}.{match[2]}"


def _check_settings(chunk: Any, hf_config: Mapping[str, Any]) -> None:
    for setting, why in REFUSED.items():
        value = getattr(chunk.config, setting, None)
        if value:
            raise SourceError(f"a model with {setting}={value!r} cannot be exported: {why}")
    for key, value in {  # the shapes of a checkpoint say neither of them
        "num_attention_heads": chunk.config.num_attention_heads,
        "tie_word_embeddings": chunk.share_embeddings_and_output_weights,
    }.items():
        if hf_config.get(key, False) != value:
            raise SourceError(
                f"hf_config has {key}={hf_config.get(key, False)!r} and the Megatron model "
                f"{value!r}; give the config of this model"
            )


class _Parameter:
    """A parameter with its row of the table, and where this rank stands among its holders."""

    def __init__(self, chunk: Any, name: str, tensor: Tensor, rules: Sequence[Rule]) -> None:
        self.name, self.tensor = name, tensor
        self.head: int = chunk.config.kv_channels
        match = _LAYER_NAME.fullmatch(name)
        self.prefix = f"model.layers.{match[1]}." if match else ""
        below = match[2] if match else name
        for rule in rules if match else OUTSIDE:
            if found := rule.pattern.fullmatch(below):
                break
        else:
            raise SourceError(
                f"parameter {name!r} {list(tensor.shape)} has no Hugging Face name here: "
                "hf_config is of another architecture, or this one is not supported"
            )
        groups = chunk.pg_collection
        self.rule = rule
        self.ranks = groups.expt_tp if rule.of_experts else groups.tp
        self.replicas = groups.expt_dp if rule.of_experts else groups.dp_cp
        self.copied = name == HEAD and bool(chunk.share_embeddings_and_output_weights)
        self.experts, self.first, self.numbers = 1, 0, [0]
        if rule.of_experts:
            self.experts = chunk.config.num_moe_experts // groups.ep.size()
            self.first = groups.ep.rank() * self.experts
            self.numbers = list(range(self.experts)) if rule.stacked else [int(found[1])]

    def tensor_names(self, number: int) -> list[str]:
        """Of what it holds of the expert `number` of this rank (0: there are none)."""
        if self.copied:
            return ["model.embed_tokens.weight"]
        return [self.prefix + n.replace("*", str(self.first + number)) for n in self.rule.hf]

    def shape(self) -> tuple[int, ...]:
        """Of what it holds of one expert, as Hugging Face orients it."""
        if not self.rule.stacked:
            return tuple(self.tensor.shape)
        shape = [self.tensor.shape[1], self.tensor.shape[0]]
        shape[self.rule.split.dim] //= self.experts
        return tuple(shape)


def _placed(parameter: _Parameter, known: Mapping[str, CheckpointTensor]) -> Iterator[Held]:
    """Yield what a parameter holds: once, or once for each expert in it."""
    for number in parameter.numbers:
        names = parameter.tensor_names(number)
        if lacking := [name for name in names if name not in known]:
            raise SourceError(
                f"parameter {parameter.name!r} carries {', '.join(lacking)}, which a model of "
                "hf_config does not have; give the config of this model"
            )
        yield _held(parameter, number, [known[name] for name in names])


def _held(parameter: _Parameter, number: int, tensors: Sequence[CheckpointTensor]) -> Held:
    split, shape = parameter.rule.split, parameter.shape()
    dim, rank, ranks = split.dim, parameter.ranks.rank(), parameter.ranks.size()
    dtype, whole = tensors[0].dtype, " and ".join(f"{t.name} {list(t.shape)}" for t in tensors)
    pieces = None
    if len({_without(dim, s) for s in (shape, *(t.shape for t in tensors))}) == 1:
        lengths = [t.shape[dim] for t in tensors]
        pieces = split.pieces(lengths, shape[dim], rank, ranks, parameter.head)
    if pieces is None:
        raise SourceError(
            f"parameter {parameter.name!r} is {list(parameter.tensor.shape)}, which is no part of "
            f"{whole} over {ranks} tensor-parallel rank(s); give the config of this model"
        )
    if parameter.tensor.dtype != dtype and isinstance(parameter.tensor, nn.Parameter):
        raise SourceError(
            f"parameter {parameter.name!r} is {parameter.tensor.dtype}, and the model's "
            f"params_dtype makes {whole} {dtype}; build the model in one dtype"
        )
    cut = split.parts(lengths, shape[dim], ranks) > 1
    return Held(
        parameter.name,
        parameter.tensor,
        shape,
        (number, parameter.experts) if parameter.rule.stacked else None,
        dtype,
        tuple(_part(tensors[p.tensor], dim, p.start, p.size, p.runs) for p in pieces),
        speaks=parameter.replicas.rank() == 0 and (cut or rank == 0) and not parameter.copied,
    )


def _part(
    tensor: CheckpointTensor, dim: int, start: int, size: int, runs: tuple[tuple[int, int], ...]
) -> Part:
    offset, shape = [0] * len(tensor.shape), list(tensor.shape)
    offset[dim], shape[dim] = start, size
    return Part(tensor.name, Box(tuple(offset), tuple(shape)), dim, runs)


def _without(dim: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]
