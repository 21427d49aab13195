"""The policy: a Qwen-shaped GPTModel of megatron-core, and the same model's Hugging Face config.

Local layer spec, RMSNorm, RoPE, grouped-query attention, SwiGLU, untied head, BF16. Of the two
families Qwen3 normalizes q and k, Qwen2 adds biases to q, k and v. Initial matrices are drawn for
each parameter by its global name and cut afterwards, so that every layout (TP, PP) starts from the
same model bit for bit; norms begin at one, biases at zero:

    W[name] ~ N(0, std),  generator seeded with sha256(seed / name)
    std = init_std, and init_std / sqrt(2 layers) where a matrix writes to the residual stream
          (GPT-2's rule, Radford et al. 2019)

Left out: MoE, other biases, tied embeddings, sliding windows, RoPE scaling.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8rl.config import ModelConfig, RunConfig
from fp8rl.errors import TrainerError
from fp8rl.sync.megatron_layout import global_parameters

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def hf_config(model: ModelConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """Return the config.json of the Qwen3ForCausalLM or Qwen2ForCausalLM that has this shape."""
    of_family: dict[str, dict[str, Any]] = {
        "qwen3": {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": model.head_dim,
            "attention_bias": False,
        },
        "qwen2": {"architectures": ["Qwen2ForCausalLM"]},  # head_dim and biases are not its choice
    }
    return of_family[model.family] | {
        "model_type": model.family,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": max_positions,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "initializer_range": model.init_std,
        "dtype": "bfloat16",
    }


def build_model(config: RunConfig, vocab_size: int) -> GPTModel:
    """Build this rank's part of the policy, BF16, on the CPU, with its initial weights.

    ``megatron.core.parallel_state`` must be initialised and ``cpu_stands_in`` be active.

    Raises:
        TrainerError: the vocabulary does not divide over the tensor-parallel ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    if vocab_size % config.trainer.tensor_parallel:
        raise TrainerError(
            f"the vocabulary has {vocab_size} tokens, which trainer.tensor_parallel="
            f"{config.trainer.tensor_parallel} does not divide; pad the vocabulary"
        )
    with torch.random.fork_rng(devices=[]):  # Megatron's own draws are replaced below
        model = GPTModel(
            config=_transformer_config(config),
            transformer_layer_spec=get_gpt_layer_local_spec(
                qk_layernorm=config.model.family == "qwen3", normalization="RMSNorm"
            ),
            vocab_size=vocab_size,
            max_sequence_length=2**20,  # RoPE needs no bound; nothing is allocated for it
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
        ).bfloat16()
    _draw_weights(model, config)
    return model


def _transformer_config(config: RunConfig) -> TransformerConfig:
    from megatron.core.transformer import TransformerConfig

    shape = config.model
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.family == "qwen3",
        add_qkv_bias=shape.family == "qwen2",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=config.trainer.tensor_parallel,
        pipeline_model_parallel_size=config.trainer.pipeline_parallel,
        use_cpu_initialization=True,
        cuda_graph_scope=[],  # Megatron's default for it is one that it warns about
        # the fused kernels are CUDA's
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,  # batched sends synchronise a CUDA device
    )


@torch.no_grad()
def _draw_weights(model: GPTModel, config: RunConfig) -> None:
    """Overwrite every matrix by its own draw; norms keep their ones, biases their zeros."""
    residual_std = config.model.init_std / math.sqrt(2 * config.model.num_layers)
    for name, parameter in global_parameters(model).items():
        if parameter.ndim < 2:
            continue
        std = residual_std if name.endswith(RESIDUAL_WRITERS) else config.model.init_std
        generator = torch.Generator().manual_seed(_seed_of(config.seed, name))
        parameter.copy_(_draw_shard(parameter, config.trainer.tensor_parallel, std, generator))


def _draw_shard(parameter: Tensor, ranks: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw the whole matrix and cut this rank's part, as Megatron's layers describe themselves."""
    from megatron.core import parallel_state

    dim, stride = int(parameter.partition_dim), int(parameter.partition_stride)  # type: ignore[attr-defined]
    shape = list(parameter.shape)
    shape[dim] *= ranks
    whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    pieces = whole.chunk(ranks * stride, dim=dim)  # stride 2: gate rows, then up rows
    rank = parallel_state.get_tensor_model_parallel_rank()
    return torch.cat(pieces[rank::ranks], dim=dim)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
