"""How the tests' models lie over ranks, and Megatron's configuration of each family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

LAYERS = 4


class Layout(NamedTuple):
    """How a model lies over the ranks; what is left of them is data parallel.

    experts: "sequential", "grouped" (Transformer Engine's) or "stacked" (legacy). fused: layers
    with Transformer Engine's names. padded: the vocabulary with its padding.
    """

    tp: int = 1
    pp: int = 1
    chunks: int = 1
    ep: int = 1
    etp: int | None = None
    experts: str = "sequential"
    fused: bool = False
    padded: int = 128


def transformer_config(config: dict[str, Any], layout: Layout, **settings: Any) -> Any:
    """Megatron's configuration of the same model."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    model_type, heads = config["model_type"], config["num_attention_heads"]
    latent = model_type == "deepseek_v3"
    chosen: dict[str, Any] = dict(
        num_layers=LAYERS,
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        layernorm_epsilon=config["rms_norm_eps"],
        qk_layernorm=model_type in ("qwen3", "qwen3_moe", "deepseek_v3"),
        add_qkv_bias=model_type == "qwen2",
        add_bias_linear=config.get("mlp_bias", False),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        moe_layer_freq=1,
    )  # fmt: skip
    if not latent:
        chosen["kv_channels"] = config.get("head_dim", config["hidden_size"] // heads)
    if "num_experts_per_tok" in config:
        chosen |= _experts(config, layout)
    if latent:
        chosen |= _latent(config)
    make = MLATransformerConfig if latent else TransformerConfig
    return make(**_ON_A_CPU | chosen | settings)


_ON_A_CPU: dict[str, Any] = dict(
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=nn.functional.silu,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    attention_softmax_in_fp32=True,
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
    use_cpu_initialization=True,
    cuda_graph_scope=[],
    masked_softmax_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    apply_rope_fusion=False,
    gradient_accumulation_fusion=False,
    persist_layer_norm=False,
    batch_p2p_comm=False,
)  # fmt: skip


def _experts(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Settings of sparse layers, some of which may be dense."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    dense = set(config.get("mlp_only_layers", range(config.get("first_k_dense_replace", 0))))
    return dict(
        num_moe_experts=next(config[key] for key in keys if key in config),
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config.get("moe_intermediate_size", config["intermediate_size"]),
        moe_layer_freq=[int(layer not in dense) for layer in range(LAYERS)],
        moe_token_dispatcher_type="allgather",  # alltoall needs CUDA streams
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=layout.experts != "sequential",
        moe_use_legacy_grouped_gemm=layout.experts == "stacked",
    )  # fmt: skip


def _latent(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of DeepSeek-V3's attention, shared experts and router."""
    return dict(
        multi_latent_attention=True,
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="rope",
        rotary_base=10000,
        moe_shared_expert_intermediate_size=(
            config["n_shared_experts"] * config["moe_intermediate_size"]
        ),
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=config["routed_scaling_factor"],
        moe_router_dtype="fp32",
    )  # fmt: skip
