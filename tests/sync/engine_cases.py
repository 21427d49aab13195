"""What the tests do to live vLLM models: which models, which parts of them, which damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.sync import engine_models

Undo = Callable[[], None]
Damage = Callable[[Any], Undo]


@dataclass
class Case:
    """A model, and what is done to it.

    part: a word in the names of the modules that are updated alone. damages: what is spoilt in the
    model -> the tensor that must be named. broken: tensors whose loader raises.
    """

    family: str
    precision: str
    part: str
    damages: dict[str, tuple[Damage, str]] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)


def element(read: Callable[[Any], torch.Tensor], index: int = 0) -> Damage:
    """Change the lowest bit of one element of a tensor that the model computes with."""

    def damage(model: Any) -> Undo:
        flat = read(model).view(-1).view(torch.uint8)
        at = index * (flat.numel() // read(model).numel()) % flat.numel()
        flat[at] ^= 1
        return lambda: flat[at].bitwise_xor_(1)

    return damage


def old_kernel(read: Callable[[Any], Any], rows: slice = slice(None)) -> Damage:
    """Let a module multiply by other weights in some rows, as if its kernel were one of before."""

    def damage(model: Any) -> Undo:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        module = read(model)
        now, weight = module.cpu_linear, module.weight
        held = weight.data.clone()
        if not held.numel():  # it is in the kernel alone; products with ones give it back
            held = now(torch.eye(module.input_size, dtype=held.dtype), weight, None).T.contiguous()
        held[rows] *= 1.01
        module.weight = torch.nn.Parameter(held, requires_grad=False)
        dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        module.weight = weight

        def undo() -> None:
            module.cpu_linear = now

        return undo

    return damage


def in_kernel(read: Callable[[Any], Any], index: int = 0) -> Damage:
    """Spoil the weight that a BF16 kernel keeps for itself: one element, where it can be seen.

    That is where vLLM packed it for AMX. Elsewhere oneDNN has it, and a row becomes an old one.
    """

    def damage(model: Any) -> Undo:
        from fp8rl.sync.engine_private import packed_weight

        weight = packed_weight(read(model).cpu_linear)
        if weight is None:
            return old_kernel(read, slice(index, index + 1 or None))(model)
        return element(lambda _: weight, index)(model)

    return damage


def _layer(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: read(model.model.layers[1])


_qkv = _layer(lambda layer: layer.self_attn.qkv_proj)
_gate_up = _layer(lambda layer: layer.mlp.gate_up_proj)
_experts = _layer(lambda layer: layer.mlp.experts.routed_experts)
_kernel = _layer(lambda layer: layer.mlp.experts.routed_experts.quant_method.moe_kernel)
_A, _M = "model.layers.1.self_attn", "model.layers.1.mlp"
_HEAD = {"a head's old kernel": (old_kernel(lambda m: m.lm_head), "lm_head.weight")}
_EXPERTS = {
    "gate of the first expert": (
        element(lambda m: _experts(m).w13_weight.data, 5),
        f"{_M}.experts.0.gate_proj.weight",
    ),
    "up of the last expert": (
        element(lambda m: _experts(m).w13_weight.data, -5),
        f"{_M}.experts.3.up_proj.weight",
    ),
    "down of the last expert": (
        element(lambda m: _experts(m).w2_weight.data, -1),
        f"{_M}.experts.3.down_proj.weight",
    ),
    "router in its kernel": (
        in_kernel(_layer(lambda layer: layer.mlp.gate)),
        f"{_M}.gate.weight",
    ),
}
CASES = {
    "dense fp8": Case(
        "qwen2",
        "fp8",
        "layers.1.self_attn",
        {
            "first bias": (element(lambda m: _qkv(m).bias.data, 0), f"{_A}.q_proj.bias"),
            "last bias": (element(lambda m: _qkv(m).bias.data, -1), f"{_A}.v_proj.bias"),
            "first part": (element(lambda m: _qkv(m).weight.data), f"{_A}.q_proj.weight"),
            "last part": (element(lambda m: _qkv(m).weight.data, -1), f"{_A}.v_proj.weight"),
            "scale": (
                element(lambda m: _gate_up(m).weight_scale_inv.data, -1),
                f"{_M}.up_proj.weight_scale_inv",
            ),
            "embedding": (
                element(lambda m: m.model.embed_tokens.weight.data, 500_000),
                "model.embed_tokens.weight",
            ),
            **_HEAD,
        },
        broken=(f"{_A}.k_proj.weight", f"{_M}.up_proj.weight_scale_inv", "lm_head.weight"),
    ),
    "tied bf16": Case(
        "qwen3",
        "bf16",
        "embed",
        {
            "norm": (
                element(_layer(lambda layer: layer.self_attn.k_norm.weight.data), -1),
                f"{_A}.k_norm.weight",
            ),
            "linear in its kernel": (in_kernel(_qkv, -1), f"{_A}.v_proj.weight"),
            "embedding": (
                element(lambda m: m.model.embed_tokens.weight.data, -100_000),
                "model.embed_tokens.weight",
            ),
            "tied head's old kernel": (
                old_kernel(lambda m: m.lm_head),
                "model.embed_tokens.weight",
            ),
        },
        broken=("model.embed_tokens.weight", f"{_A}.q_proj.weight"),
        changes={"tie_word_embeddings": True},
    ),
    "moe fp8": Case(
        "qwen3_moe",
        "fp8",
        "layers.1.mlp",
        {
            **_EXPERTS,
            "scale in the experts' kernel": (
                element(lambda m: _kernel(m).fused_experts.w1_scale, -1),
                f"{_M}.experts.3.up_proj.weight_scale_inv",
            ),
        },
        broken=(f"{_M}.experts.2.up_proj.weight", f"{_M}.experts.3.down_proj.weight_scale_inv"),
    ),
    "moe bf16": Case(
        "qwen3_moe",
        "bf16",
        "layers.0.mlp.experts",
        _EXPERTS,
        broken=(f"{_M}.experts.2.down_proj.weight",),
        changes={"moe_intermediate_size": 48},  # padded to 64 in the kernel
    ),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in engine_models.ARCHITECTURES},
    **{f"{f}, tied": (f, {"tie_word_embeddings": True}) for f in engine_models.ARCHITECTURES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3_moe, one layer dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_moe, each second dense": ("qwen3_moe", {"decoder_sparse_step": 2}),
}
CASES |= {
    f"{name}, {precision}": Case(family, precision, "layers.1", changes=changes)
    for name, (family, changes) in VARIANTS.items()
    for precision in ("fp8", "bf16")
}
