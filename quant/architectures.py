"""What tensors a Hugging Face checkpoint holds, from its config alone.

Each tensor has a name, a shape, the part it plays, and, for the linears of decoder layers, how the
engine splits it over tensor-parallel ranks and which of its fused linears it becomes a shard of.
Order is that of the model's own state dict. A supported architecture is one function here.

Source: transformers, models/qwen3; vLLM, model_executor/models/qwen3 (QKVParallelLinear replicates
key and value heads where ranks outnumber them). Left out: anything but dense Qwen3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from fp8rl.quant.errors import QuantPlanError


@dataclass(frozen=True)
class Split:
    """How tensor parallelism divides a linear weight [N, K].

    dim: 0 (output rows) or 1 (input columns). units: indivisible pieces along it (heads, or single
    rows and columns). replicated: ranks beyond `units` hold copies instead of nothing.
    """

    dim: Literal[0, 1]
    units: int
    replicated: bool = False


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint; `layer`, `split` and `fused` are None outside decoder linears."""

    name: str
    shape: tuple[int, ...]
    role: Literal["linear", "norm", "embedding", "head"]
    layer: int | None = None
    split: Split | None = None
    fused: str | None = None

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor, as in `modules_to_not_convert`."""
        return self.name.rpartition(".")[0]


def checkpoint_tensors(config: Mapping[str, Any]) -> tuple[CheckpointTensor, ...]:
    """Return every tensor of the checkpoint that `config` (a config.json as a mapping) describes.

    Raises QuantPlanError for an architecture that is not supported, a key that is missing or wrong.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list | tuple) or len(architectures) != 1:
        raise QuantPlanError(
            f"config key 'architectures' must name one architecture, found {architectures!r}; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    build = _ARCHITECTURES.get(architectures[0])
    if build is None:
        raise QuantPlanError(
            f"architecture {architectures[0]!r} is not supported; "
            f"supported: {', '.join(_ARCHITECTURES)}"
        )
    return tuple(build(config))


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise QuantPlanError(f"config key {key!r} must be a positive integer, found {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise QuantPlanError(f"config key {key!r} must be true or false, found {value!r}")
    return value


def _qwen3(config: Mapping[str, Any]) -> list[CheckpointTensor]:
    hidden, vocab = _size(config, "hidden_size"), _size(config, "vocab_size")
    if _flag(config, "attention_bias"):
        raise QuantPlanError(
            "attention_bias=true is not supported: the engine's Qwen3 has no bias on o_proj, so "
            "the checkpoint's would be lost; use a model without attention biases"
        )
    tensors = [CheckpointTensor("model.embed_tokens.weight", (vocab, hidden), "embedding")]
    for layer in range(_size(config, "num_hidden_layers")):
        tensors += _qwen3_layer(config, layer)
    tensors.append(CheckpointTensor("model.norm.weight", (hidden,), "norm"))
    if not _flag(config, "tie_word_embeddings"):
        tensors.append(CheckpointTensor("lm_head.weight", (vocab, hidden), "head"))
    return tensors


def _qwen3_layer(config: Mapping[str, Any], layer: int) -> list[CheckpointTensor]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    heads, kv_heads = _size(config, "num_attention_heads"), _size(config, "num_key_value_heads")
    head = _size(config, "head_dim")
    prefix = f"model.layers.{layer}"

    def linear(
        module: str, rows: int, columns: int, split: Split, fused: str | None = None
    ) -> CheckpointTensor:
        into = f"{prefix}.{fused}" if fused else None
        name = f"{prefix}.{module}.weight"
        return CheckpointTensor(name, (rows, columns), "linear", layer, split, into)

    def norm(module: str, size: int) -> CheckpointTensor:
        return CheckpointTensor(f"{prefix}.{module}.weight", (size,), "norm", layer)

    q_split, kv_split = Split(0, heads), Split(0, kv_heads, replicated=True)
    qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
    return [
        linear("self_attn.q_proj", heads * head, hidden, q_split, qkv),
        linear("self_attn.k_proj", kv_heads * head, hidden, kv_split, qkv),
        linear("self_attn.v_proj", kv_heads * head, hidden, kv_split, qkv),
        linear("self_attn.o_proj", hidden, heads * head, Split(1, heads)),
        norm("self_attn.q_norm", head),
        norm("self_attn.k_norm", head),
        linear("mlp.gate_proj", inner, hidden, Split(0, inner), gate_up),
        linear("mlp.up_proj", inner, hidden, Split(0, inner), gate_up),
        linear("mlp.down_proj", hidden, inner, Split(1, inner)),
        norm("input_layernorm", hidden),
        norm("post_attention_layernorm", hidden),
    ]


_ARCHITECTURES: Final[dict[str, Callable[[Mapping[str, Any]], list[CheckpointTensor]]]] = {
    "Qwen3ForCausalLM": _qwen3,
}
