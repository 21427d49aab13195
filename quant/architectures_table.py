"""The tensors of each architecture, as a table.

One row is one tensor of a decoder layer, named as on the Hugging Face hub; `*` stands for the
number of each expert. A size is a sum of products of names (`heads*nope+heads*value`), each read
from the config under one of its `KEYS`. An architecture is its attention rows, its dense or sparse
MLP rows, and which layers are sparse; embeddings, norms and head are the same for all.

Source: transformers 5, models/{llama,qwen2,qwen3,qwen3_moe,mixtral,deepseek_v3} (names, shapes);
vLLM 0.32, model_executor/models, `packed_modules_mapping` and linear classes (`cut`, `fused`). Left
out: multi-token prediction (DeepSeek-V3's layers after `num_hidden_layers`), which neither
transformers nor vLLM loads with the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import torch

Role = Literal["linear", "norm", "embedding", "head", "router", "bias", "unplaced"]


class Cut(NamedTuple):
    """How tensor parallelism divides a linear: dimension `dim` into `units` indivisible pieces.

    dim: 0 (output rows) or 1 (input columns). units: a size, as in a row's shape. replicated: ranks
    beyond `units` hold copies instead of nothing.
    """

    dim: Literal[0, 1]
    units: str
    replicated: bool = False


class Row(NamedTuple):
    """One tensor of a decoder layer.

    name: below `model.layers.N`. fused: the module of the engine that it becomes a part of. ragged:
    its rows need not fill whole blocks, being the last of `fused` and never cut. when: the config
    key without which there is no such tensor (with `!`: with which there is none). dtype: in which
    the engine holds it where it is not quantized.
    """

    name: str
    shape: tuple[str, ...]
    role: Role
    cut: Cut | None = None
    fused: str | None = None
    ragged: bool = False
    when: str | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Architecture:
    """One line of the table.

    is_sparse: (config, layer) -> whether the layer's MLP is `sparse`. defaults: what a size is
    where the config lacks it. refused: config flag -> why a model that sets it cannot be served.
    """

    attention: Sequence[Row]
    dense: Sequence[Row] = ()
    sparse: Sequence[Row] = ()
    is_sparse: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: False
    defaults: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "vocab": ("vocab_size",),
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head": ("head_dim",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_inner": ("moe_intermediate_size",),
    "shared": ("n_shared_experts",),
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "value": ("v_head_dim",),
}

# Module names on the hub -> in memory in transformers 5, whose quantizer matches the latter.
MODULE_ALIASES: Final = {".block_sparse_moe.": ".mlp."}


def _linear(
    module: str,
    rows: str,
    columns: str,
    cut: Cut | None = None,
    fused: str | None = None,
    *,
    ragged: bool = False,
    when: str | None = None,
) -> Row:
    return Row(f"{module}.weight", (rows, columns), "linear", cut, fused, ragged, when)


def _norm(module: str, size: str, when: str | None = None) -> Row:
    return Row(f"{module}.weight", (size,), "norm", when=when)


def _biased(rows: Sequence[Row], leaves: str, when: str | None = None) -> tuple[Row, ...]:
    """Add a bias after each linear of `rows` whose last name is in `leaves`."""
    result: list[Row] = []
    for row in rows:
        result.append(row)
        module = row.name.removesuffix(".weight")
        if module.rpartition(".")[2] in leaves.split():
            result.append(Row(f"{module}.bias", row.shape[:1], "bias", when=when))
    return tuple(result)


def _mlp(prefix: str, inner: str) -> tuple[Row, ...]:
    fused = f"{prefix}.gate_up_proj"
    return (
        _linear(f"{prefix}.gate_proj", inner, "hidden", Cut(0, inner), fused),
        _linear(f"{prefix}.up_proj", inner, "hidden", Cut(0, inner), fused),
        _linear(f"{prefix}.down_proj", "hidden", inner, Cut(1, inner)),
    )


def _experts(prefix: str, gate: str, up: str, down: str, inner: str) -> tuple[Row, ...]:
    """All experts of a layer are one module of the engine."""
    return (
        _linear(f"{prefix}.*.{gate}", inner, "hidden", Cut(0, inner), prefix),
        _linear(f"{prefix}.*.{up}", inner, "hidden", Cut(0, inner), prefix),
        _linear(f"{prefix}.*.{down}", "hidden", inner, Cut(1, inner), prefix),
    )


def _router(module: str) -> Row:
    return Row(f"{module}.weight", ("experts", "hidden"), "router")


_QKV = "self_attn.qkv_proj"
_Q_CUT, _KV_CUT = Cut(0, "heads"), Cut(0, "kv_heads", replicated=True)
_ATTENTION = (
    _linear("self_attn.q_proj", "heads*head", "hidden", _Q_CUT, _QKV),
    _linear("self_attn.k_proj", "kv_heads*head", "hidden", _KV_CUT, _QKV),
    _linear("self_attn.v_proj", "kv_heads*head", "hidden", _KV_CUT, _QKV),
    _linear("self_attn.o_proj", "hidden", "heads*head", Cut(1, "heads")),
)
_QK_NORMS = (_norm("self_attn.q_norm", "head"), _norm("self_attn.k_norm", "head"))

_QKV_A = "self_attn.fused_qkv_a_proj"
_LATENT_ATTENTION = (
    _linear("self_attn.q_proj", "heads*nope+heads*rope", "hidden", _Q_CUT, when="!q_lora_rank"),
    _linear("self_attn.q_a_proj", "q_rank", "hidden", None, _QKV_A, when="q_lora_rank"),
    _norm("self_attn.q_a_layernorm", "q_rank", when="q_lora_rank"),
    _linear("self_attn.q_b_proj", "heads*nope+heads*rope", "q_rank", _Q_CUT, when="q_lora_rank"),
    _linear("self_attn.kv_a_proj_with_mqa", "kv_rank+rope", "hidden", None, _QKV_A, ragged=True),
    _norm("self_attn.kv_a_layernorm", "kv_rank"),
    _linear("self_attn.kv_b_proj", "heads*nope+heads*value", "kv_rank", _Q_CUT),
    _linear("self_attn.o_proj", "hidden", "heads*value", Cut(1, "heads")),
)

_MLP = _mlp("mlp", "inner")
_QWEN3_EXPERTS = (
    _router("mlp.gate"),
    *_experts("mlp.experts", "gate_proj", "up_proj", "down_proj", "expert_inner"),
)
_MIXTRAL_EXPERTS = (
    _router("block_sparse_moe.gate"),
    *_experts("block_sparse_moe.experts", "w1", "w3", "w2", "inner"),
)
_DEEPSEEK_EXPERTS = (
    *_QWEN3_EXPERTS,
    Row("mlp.gate.e_score_correction_bias", ("experts",), "router", dtype=torch.float32),
    *_mlp("mlp.shared_experts", "shared*expert_inner"),
)
LAYER_NORMS: Final = (
    _norm("input_layernorm", "hidden"),
    _norm("post_attention_layernorm", "hidden"),
)


def _qwen3_sparse(config: Mapping[str, Any], layer: int) -> bool:
    step: int = config.get("decoder_sparse_step", 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _deepseek_sparse(config: Mapping[str, Any], layer: int) -> bool:
    first: int = config.get("first_k_dense_replace", 0)
    return layer >= first and layer % int(config.get("moe_layer_freq", 1)) == 0


_NO_BIAS: Final = {
    "attention_bias": (
        "the engine's attention of this architecture has no bias on every projection that the "
        "checkpoint has one on, so it would be lost; use a model without attention biases"
    )
}
_HEAD: Final = {"head": "hidden/heads"}

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "LlamaForCausalLM": Architecture(
        _biased(_ATTENTION, "q_proj k_proj v_proj o_proj", when="attention_bias"),
        _biased(_MLP, "gate_proj up_proj down_proj", when="mlp_bias"),
        defaults=_HEAD | {"kv_heads": "heads"},
    ),
    "Qwen2ForCausalLM": Architecture(
        _biased(_ATTENTION, "q_proj k_proj v_proj"), _MLP, defaults=_HEAD
    ),
    "Qwen3ForCausalLM": Architecture((*_ATTENTION, *_QK_NORMS), _MLP, refused=_NO_BIAS),
    "Qwen3MoeForCausalLM": Architecture(
        (*_ATTENTION, *_QK_NORMS), _MLP, _QWEN3_EXPERTS, _qwen3_sparse, refused=_NO_BIAS
    ),
    "MixtralForCausalLM": Architecture(
        _ATTENTION,
        sparse=_MIXTRAL_EXPERTS,
        is_sparse=lambda config, layer: True,
        defaults=_HEAD,
    ),
    "DeepseekV3ForCausalLM": Architecture(
        _LATENT_ATTENTION, _MLP, _DEEPSEEK_EXPERTS, _deepseek_sparse, refused=_NO_BIAS
    ),
}
