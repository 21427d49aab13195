"""Weights of a megatron-core GPTModel as Hugging Face tensors, gathered one by one.

One table says, for each Megatron parameter, which Hugging Face tensors it holds and how it lies
over tensor-parallel ranks. Two layouts are not what they look like:

    linear_qkv  rows are grouped: for each kv head its query heads, then k, then v
                [kv, q_per_kv + 2, head_dim, hidden]; ranks hold runs of groups; its bias likewise
    linear_fc1  each rank holds [its gate rows; its up rows], so joining ranks by rows would
                interleave gate and up

Pipeline stages number layers from 0 each; here every layer has its global number. Every rank of
the trainer iterates in lockstep and gets every tensor whole; a single process gets views wherever
the layouts agree. Bytes travel as uint8, so every dtype goes over Gloo unchanged. Left out: MoE,
other biases, tied embeddings, interleaved pipelines, and the way back from Hugging Face.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.quant import TrainerLinear
from fp8rl.sync.errors import SourceError
from fp8rl.sync.source import TensorMeta

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

Dims = Mapping[str, int]
Join = Callable[[list[Tensor], Dims], tuple[Tensor, ...]]


def _same(shards: list[Tensor], dims: Dims) -> tuple[Tensor, ...]:
    """Every rank holds the whole."""
    return (shards[0],)


def _rows(shards: list[Tensor], dims: Dims) -> tuple[Tensor, ...]:
    """Ranks hold runs of rows."""
    return (_cat(shards, 0),)


def _columns(shards: list[Tensor], dims: Dims) -> tuple[Tensor, ...]:
    """Ranks hold runs of columns."""
    return (_cat(shards, 1),)


def _gate_up(shards: list[Tensor], dims: Dims) -> tuple[Tensor, ...]:
    """Each rank holds its gate rows, then its up rows."""
    halves = [shard.chunk(2) for shard in shards]
    return _cat([gate for gate, _ in halves], 0), _cat([up for _, up in halves], 0)


def _grouped_qkv(shards: list[Tensor], dims: Dims) -> tuple[Tensor, ...]:
    """Ranks hold runs of groups: the query heads of a kv head, then k, then v."""
    groups, per_group = dims["kv"] // dims["head"], dims["q"] // dims["kv"]
    joined = _cat(shards, 0)
    grouped = joined.view(groups, per_group + 2, dims["head"], *joined.shape[1:])
    parts = torch.split(grouped, [per_group, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def _cat(shards: list[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: the Hugging Face tensors in it (name -> shape) and how it is cut.

    when: the flag of the model's config without which there is no such parameter.
    """

    megatron: str
    join: Join
    hf: Mapping[str, tuple[str, ...]]
    when: str | None = None


_HF, _MC = "model.layers.{layer}.", "decoder.layers.{layer}."
HEAD = (
    Rule(
        "embedding.word_embeddings.weight",
        _rows,
        {"model.embed_tokens.weight": ("vocab", "hidden")},
    ),
)
LAYER = (
    Rule(
        _MC + "self_attention.linear_qkv.weight",
        _grouped_qkv,
        {
            _HF + "self_attn.q_proj.weight": ("q", "hidden"),
            _HF + "self_attn.k_proj.weight": ("kv", "hidden"),
            _HF + "self_attn.v_proj.weight": ("kv", "hidden"),
        },
    ),
    Rule(
        _MC + "self_attention.linear_qkv.bias",
        _grouped_qkv,
        {
            _HF + "self_attn.q_proj.bias": ("q",),
            _HF + "self_attn.k_proj.bias": ("kv",),
            _HF + "self_attn.v_proj.bias": ("kv",),
        },
        when="add_qkv_bias",
    ),
    Rule(
        _MC + "self_attention.linear_proj.weight",
        _columns,
        {_HF + "self_attn.o_proj.weight": ("hidden", "q")},
    ),
    Rule(
        _MC + "self_attention.q_layernorm.weight",
        _same,
        {_HF + "self_attn.q_norm.weight": ("head",)},
        when="qk_layernorm",
    ),
    Rule(
        _MC + "self_attention.k_layernorm.weight",
        _same,
        {_HF + "self_attn.k_norm.weight": ("head",)},
        when="qk_layernorm",
    ),
    Rule(
        _MC + "mlp.linear_fc1.weight",
        _gate_up,
        {
            _HF + "mlp.gate_proj.weight": ("ffn", "hidden"),
            _HF + "mlp.up_proj.weight": ("ffn", "hidden"),
        },
    ),
    Rule(
        _MC + "mlp.linear_fc2.weight", _columns, {_HF + "mlp.down_proj.weight": ("hidden", "ffn")}
    ),
    Rule(_MC + "input_layernorm.weight", _same, {_HF + "input_layernorm.weight": ("hidden",)}),
    Rule(
        _MC + "pre_mlp_layernorm.weight",
        _same,
        {_HF + "post_attention_layernorm.weight": ("hidden",)},
    ),
)
TAIL = (
    Rule("decoder.final_layernorm.weight", _same, {"model.norm.weight": ("hidden",)}),
    Rule("output_layer.weight", _rows, {"lm_head.weight": ("vocab", "hidden")}),
)


def global_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters under names with global (not stage-local) layer numbers."""
    found = {}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if match:
            layer = model.decoder.layers[int(match[1])].layer_number - 1  # Megatron counts from 1
            name = f"decoder.layers.{layer}.{match[2]}"
        found[name] = parameter
    return found


class MegatronSource:
    """A ``WeightSource`` over the unwrapped GPTModel of every trainer rank.

    Construction and iteration are collectives over the model's tensor- and pipeline-parallel
    groups. What is yielded may be a view of a live parameter: use it before the next update.

    Raises:
        SourceError: a parameter that the table does not know, one that no rank holds,
            or one of another dtype or shape than the model's configuration says.
    """

    def __init__(self, model: GPTModel) -> None:
        config = model.config
        self._model = model
        self._tp, self._pp = model.pg_collection.tp, model.pg_collection.pp
        self._dtype: torch.dtype = config.params_dtype
        self._dims = {
            "vocab": model.vocab_size,
            "hidden": config.hidden_size,
            "head": config.kv_channels,
            "q": config.num_attention_heads * config.kv_channels,
            "kv": config.num_query_groups * config.kv_channels,
            "ffn": config.ffn_hidden_size,
        }
        self._rules = list(_expand(config))
        self._parameters = global_parameters(model)
        self._check_known()
        self._stage_of = self._find_stages()

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and whole shape of every tensor, in order of Megatron's; moves nothing."""
        return [
            TensorMeta(name, self._dtype, tuple(self._dims[d] for d in shape))
            for rule in self._rules
            for name, shape in rule.hf.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, whole tensor)`` on every rank, in the order of ``metadata``."""
        for rule in self._rules:
            yield from zip(rule.hf, self._whole(rule), strict=True)

    def linears(self) -> list[TrainerLinear]:
        """Return this rank's decoder linears, for ``fake_quantize``; moves nothing.

        Each with the rows of its (shard of) Hugging Face tensors: a rule's join of row numbers.
        """
        owners = {id(p): m for m in self._model.modules() for p in m.parameters(recurse=False)}
        ranks = self._tp.size()
        local = {"head": self._dims["head"]}
        local |= {name: self._dims[name] // ranks for name in ("q", "kv")}
        found = []
        for rule in self._rules:
            weight = self._parameters.get(rule.megatron)
            if weight is None or weight.ndim != 2 or not rule.megatron.startswith("decoder."):
                continue
            numbers = rule.join([torch.arange(weight.shape[0])[:, None]], local)
            rows = {name: n.flatten() for name, n in zip(rule.hf, numbers, strict=True)}
            found.append(TrainerLinear(owners[id(weight)], rows))
        return found

    def _whole(self, rule: Rule) -> tuple[Tensor, ...]:
        stage = self._stage_of[rule.megatron]
        if stage == self._pp.rank():
            shard = self._parameters[rule.megatron].detach()
            shards = [shard] if rule.join is _same else self._gather(shard)
            tensors = rule.join(shards, self._dims)
        else:
            shapes = [[self._dims[d] for d in shape] for shape in rule.hf.values()]
            tensors = tuple(torch.empty(shape, dtype=self._dtype) for shape in shapes)
        if self._pp.size() > 1:
            owner = dist.get_global_rank(self._pp, stage)
            tensors = tuple(tensor.contiguous() for tensor in tensors)
            for tensor in tensors:
                dist.broadcast(tensor.view(torch.uint8), owner, group=self._pp)
        return tensors

    def _gather(self, shard: Tensor) -> list[Tensor]:
        if self._tp.size() == 1:
            return [shard]
        shards = [torch.empty_like(shard) for _ in range(self._tp.size())]
        dist.all_gather(
            [one.view(torch.uint8) for one in shards],
            shard.contiguous().view(torch.uint8),
            group=self._tp,
        )
        return shards

    def _check_known(self) -> None:
        known = {rule.megatron for rule in self._rules}
        for name, parameter in self._parameters.items():
            if name not in known:
                raise SourceError(
                    f"parameter {name!r} {list(parameter.shape)} has no Hugging Face name here; "
                    "this source knows dense models shaped like Qwen3 or Qwen2 (no biases but on "
                    "q, k, v; untied head)"
                )
            if parameter.dtype != self._dtype:
                raise SourceError(
                    f"parameter {name!r} is {parameter.dtype}, but the model's params_dtype is "
                    f"{self._dtype}; build the model in one dtype"
                )

    def _find_stages(self) -> dict[str, int]:
        """Which pipeline stage holds each parameter, found by asking all of them."""
        held = torch.tensor([rule.megatron in self._parameters for rule in self._rules]).int()
        by_stage = [torch.empty_like(held) for _ in range(self._pp.size())]
        dist.all_gather(by_stage, held, group=self._pp)
        holders = torch.stack(by_stage)
        for rule, count in zip(self._rules, holders.sum(0).tolist(), strict=True):
            if count != 1:
                raise SourceError(
                    f"parameter {rule.megatron!r} is held by {count} pipeline stages, expected 1; "
                    f"it carries {', '.join(rule.hf)}"
                )
        stages = holders.argmax(0).tolist()
        return {rule.megatron: stage for rule, stage in zip(self._rules, stages, strict=True)}


def _expand(config: TransformerConfig) -> Iterator[Rule]:
    """The rules of a model: those of its layers once for each layer, by global number."""
    present = [rule for rule in LAYER if rule.when is None or getattr(config, rule.when)]
    yield from HEAD
    for layer in range(config.num_layers):
        for rule in present:
            hf = {name.format(layer=layer): shape for name, shape in rule.hf.items()}
            yield Rule(rule.megatron.format(layer=layer), rule.join, hf)
    yield from TAIL
