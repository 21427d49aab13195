"""Small and real configs of every architecture that the plan knows."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
_LATENT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
}

# Three layers each; where an architecture has dense layers among sparse ones, so have these.
TINY = {
    "llama": SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama with biases": SIZES
    | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    | {"attention_bias": True, "mlp_bias": True},
    "qwen2": SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": SIZES
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64}
    | {"tie_word_embeddings": True},
    "qwen3-moe": SIZES
    | _EXPERTS
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64}
    | {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "qwen3-moe, every other layer": SIZES
    | _EXPERTS
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64}
    | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "mixtral": SIZES
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek-v3": SIZES | _EXPERTS | _LATENT | {"num_key_value_heads": 4, "q_lora_rank": 128},
    "deepseek-v3 without q rank": SIZES
    | _EXPERTS
    | _LATENT
    | {"num_key_value_heads": 4, "q_lora_rank": None},
}

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
