"""Which Hugging Face tensors the parameters of a megatron-core GPTModel hold, as a table.

One row is one parameter, named below its layer; how tensor-parallel ranks cut it; and the tensors
in it, named below theirs. `*` is the number of an expert: among those of its rank in a parameter's
name, among all in a tensor's. Experts lie one by one (SequentialMLP; TEGroupedMLP, which numbers
the weights of one linear) or stacked in one matrix (legacy GroupedMLP: side by side, each
transposed). Norms that Transformer Engine fuses into the linear after them have rows of their own;
a model has either of the two.

Source: megatron-core 0.16.1, models/gpt/gpt_layer_specs.py and the layers that it names. Tensor
names are those of `quant/architectures_table.py`. Left out: layers that no architecture there has
(multi-token prediction, gated attention, gated shared experts, latent experts, vision).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fp8rl.sync.megatron_split import (
    COLUMNS,
    GATE_UP,
    QKV,
    ROWS,
    ROWS_OR_WHOLE,
    VOCABULARY,
    WHOLE,
    Split,
)


@dataclass(frozen=True)
class Rule:
    """One row. stacked: all experts of a rank are one matrix, side by side, each transposed."""

    megatron: str
    split: Split
    hf: tuple[str, ...]
    stacked: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether expert parallelism places it, and expert tensor parallelism cuts it."""
        return self.megatron.startswith("mlp.experts.")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the parameter's name; group 1 is the number of an expert on its rank."""
        return re.compile(re.escape(self.megatron).replace(r"\*", r"(\d+)"))


def _mlp(megatron: str, *modules: str) -> tuple[Rule, ...]:
    """Gated MLP of `modules` gate, up and down, with and without biases."""
    *gate_up, down = modules
    return (
        Rule(f"{megatron}.linear_fc1.weight", GATE_UP, tuple(f"{m}.weight" for m in gate_up)),
        Rule(f"{megatron}.linear_fc1.bias", GATE_UP, tuple(f"{m}.bias" for m in gate_up)),
        Rule(f"{megatron}.linear_fc2.weight", COLUMNS, (f"{down}.weight",)),
        Rule(f"{megatron}.linear_fc2.bias", WHOLE, (f"{down}.bias",)),
    )


def _experts(*modules: str) -> tuple[Rule, ...]:
    """The experts of `modules` gate, up and down, in each of Megatron's three layouts."""
    *gate_up, down = (f"{module}.weight" for module in modules)
    return (
        Rule("mlp.experts.local_experts.*.linear_fc1.weight", GATE_UP, tuple(gate_up)),
        Rule("mlp.experts.local_experts.*.linear_fc2.weight", COLUMNS, (down,)),
        Rule("mlp.experts.linear_fc1.weight*", GATE_UP, tuple(gate_up)),
        Rule("mlp.experts.linear_fc2.weight*", COLUMNS, (down,)),
        Rule("mlp.experts.weight1", GATE_UP, tuple(gate_up), stacked=True),
        Rule("mlp.experts.weight2", COLUMNS, (down,), stacked=True),
    )


def _qkv(kind: str) -> Rule:
    names = tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv")
    return Rule(f"self_attention.linear_qkv.{kind}", QKV, names)


def _attention(linear: str, split: Split, hf: str) -> Rule:
    return Rule(f"self_attention.{linear}.weight", split, (f"self_attn.{hf}.weight",))


def _norm(megatron: str, hf: str) -> Rule:
    return Rule(megatron, WHOLE, (f"{hf}.weight",))


_NORMS: Final = (
    _norm("input_layernorm.weight", "input_layernorm"),
    _norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm"),
    _norm("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
)
_ATTENTION: Final = (
    _qkv("weight"),
    _qkv("bias"),
    _attention("q_layernorm", WHOLE, "q_norm"),
    _attention("k_layernorm", WHOLE, "k_norm"),
    _attention("linear_proj", COLUMNS, "o_proj"),
    Rule("self_attention.linear_proj.bias", WHOLE, ("self_attn.o_proj.bias",)),
)
_LATENT_ATTENTION: Final = (
    _attention("linear_q_proj", ROWS, "q_proj"),
    _attention("linear_q_down_proj", ROWS_OR_WHOLE, "q_a_proj"),
    _attention("q_layernorm", WHOLE, "q_a_layernorm"),
    _norm("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm"),
    _attention("linear_q_up_proj", ROWS, "q_b_proj"),
    _attention("linear_kv_down_proj", ROWS_OR_WHOLE, "kv_a_proj_with_mqa"),
    _attention("kv_layernorm", WHOLE, "kv_a_layernorm"),
    _norm("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm"),
    _attention("linear_kv_up_proj", ROWS, "kv_b_proj"),
    _attention("linear_proj", COLUMNS, "o_proj"),
)
_MLP: Final = _mlp("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QWEN3_EXPERTS: Final = (
    Rule("mlp.router.weight", WHOLE, ("mlp.gate.weight",)),
    *_experts("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"),
)
_MIXTRAL_EXPERTS: Final = (
    Rule("mlp.router.weight", WHOLE, ("block_sparse_moe.gate.weight",)),
    *_experts(*(f"block_sparse_moe.experts.*.{w}" for w in ("w1", "w3", "w2"))),
)
_SHARED: Final = "mlp.shared_experts"
_DEEPSEEK_EXPERTS: Final = (
    *_QWEN3_EXPERTS,
    Rule("mlp.router.expert_bias", WHOLE, ("mlp.gate.e_score_correction_bias",)),
    *_mlp(_SHARED, f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj", f"{_SHARED}.down_proj"),
)
_DENSE: Final = (*_NORMS, *_ATTENTION, *_MLP)

OUTSIDE: Final = (
    Rule("embedding.word_embeddings.weight", VOCABULARY, ("model.embed_tokens.weight",)),
    Rule("decoder.final_layernorm.weight", WHOLE, ("model.norm.weight",)),
    Rule("output_layer.weight", VOCABULARY, ("lm_head.weight",)),
)
"""Parameters outside the layers, by their whole names."""

LAYER: Final[Mapping[str, tuple[Rule, ...]]] = {
    "LlamaForCausalLM": _DENSE,
    "Qwen2ForCausalLM": _DENSE,
    "Qwen3ForCausalLM": _DENSE,
    "Qwen3MoeForCausalLM": (*_DENSE, *_QWEN3_EXPERTS),
    "MixtralForCausalLM": (*_DENSE, *_MIXTRAL_EXPERTS),
    "DeepseekV3ForCausalLM": (*_NORMS, *_LATENT_ATTENTION, *_MLP, *_DEEPSEEK_EXPERTS),
}
"""Parameters of a layer, below `decoder.layers.N`, for each architecture of `QuantPlan`."""

REFUSED: Final[Mapping[str, str]] = {
    "mtp_num_layers": "engines load no multi-token prediction layers with the model",
    "rotary_interleaved": "engines rotate the halves of a head, not its neighbours",
    "layernorm_zero_centered_gamma": "its norms hold gamma - 1, which engines take for gamma",
    "attention_output_gate": "no architecture known here gates its attention",
}
"""Settings of a TransformerConfig under which parameters mean something else than in the table."""
