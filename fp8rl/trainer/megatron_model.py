"""The policy: a Qwen-shaped GPTModel of megatron-core, and the same model's Hugging Face config.

Local layer spec, RMSNorm, RoPE, grouped-query attention, SwiGLU, untied head, BF16. Qwen3
normalizes q and k; Qwen2 adds biases to q, k and v instead; Qwen3-MoE is Qwen3 with experts in
every layer:

    p = softmax(router x)       the k experts of largest p, each weighted by p / (sum of these k)

Initial matrices are drawn for each parameter by its global name (of layers and experts) and cut
afterwards, so that every layout (TP, PP, EP) starts from the same model bit for bit; norms begin at
one, biases at zero:

    W[name] ~ N(0, std),  generator seeded with sha256(seed / name)
    std = init_std, and init_std / sqrt(2 layers) where a matrix writes to the residual stream
          (GPT-2's rule, Radford et al. 2019)

With experts, tensor parallelism comes with sequence parallelism: Megatron's experts are given each
token by one rank, and would count gradients twice otherwise. The ranks divide the experts into
``expert_parallel`` parts, and each expert among the ranks of its part.

Left out: shared experts, dense layers among sparse ones, other biases, tied embeddings, sliding
windows, RoPE scaling; and Megatron's load-balancing loss. RL fine-tunes a router that pretraining
has balanced, and steps on few tokens; the loss would be averaged over padding too, and enters the
gradient behind the optimizer's back, where no metric shows it.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp8rl.config.model import ModelConfig
from fp8rl.config.run import RunConfig
from fp8rl.errors import TrainerError
from fp8rl.sync.megatron_layout import global_parameters
from fp8rl.trainer.megatron_cpu import TorchRMSNorm, pad_experts

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")
EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


def hf_config(model: ModelConfig, vocab_size: int, max_positions: int) -> dict[str, Any]:
    """Return the config.json of the Qwen3, Qwen2 or Qwen3-MoE that has this shape."""
    of_family: dict[str, dict[str, Any]] = {
        "qwen3": {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": model.head_dim,
            "attention_bias": False,
        },
        "qwen2": {"architectures": ["Qwen2ForCausalLM"]},  # head_dim and biases are not its choice
    }
    of_family["qwen3_moe"] = of_family["qwen3"] | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
        "output_router_logits": False,
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

    if vocab_size % config.trainer.tensor_parallel:
        raise TrainerError(
            f"the vocabulary has {vocab_size} tokens, which trainer.tensor_parallel="
            f"{config.trainer.tensor_parallel} does not divide; pad the vocabulary"
        )
    with torch.random.fork_rng(devices=[]):  # Megatron's own draws are replaced below
        model = GPTModel(
            config=_transformer_config(config),
            transformer_layer_spec=_block_spec(config),
            vocab_size=vocab_size,
            max_sequence_length=2**20,  # RoPE needs no bound; nothing is allocated for it
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
        ).bfloat16()
    pad_experts(model)
    _draw_weights(model, config)
    return model


def _block_spec(config: RunConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, with norms that may see a part of the sequence."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    normalizes_qk = config.model.family != "qwen2"
    layer = get_gpt_layer_local_spec(
        num_experts=config.model.num_experts, qk_layernorm=normalizes_qk, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchRMSNorm
    if normalizes_qk:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    here = config.model.num_layers // config.trainer.pipeline_parallel
    return TransformerBlockSubmodules(layer_specs=[layer] * here, layer_norm=TorchRMSNorm)


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
        qk_layernorm=shape.family != "qwen2",
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
        **(_experts(config) if shape.is_moe else {}),
    )


def _experts(config: RunConfig) -> dict[str, Any]:
    """Megatron's settings of the experts, as Qwen3-MoE has them and a CPU computes them."""
    shape, layout = config.model, config.trainer
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_router_score_function": "softmax",  # over the k chosen: as normalizing those of all
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.tensor_parallel // layout.expert_parallel,
        "sequence_parallel": layout.tensor_parallel > 1,
    }


@torch.no_grad()
def _draw_weights(model: GPTModel, config: RunConfig) -> None:
    """Overwrite every matrix by its own draw; norms keep their ones, biases their zeros."""
    residual_std = config.model.init_std / math.sqrt(2 * config.model.num_layers)
    for name, parameter in global_parameters(model).items():
        if parameter.ndim < 2:
            continue
        std = residual_std if name.endswith(RESIDUAL_WRITERS) else config.model.init_std
        generator = torch.Generator().manual_seed(
            _seed_of(config.seed, _of_all_experts(name, config))
        )
        parameter.copy_(_draw_shard(name, parameter, std, generator))


def _of_all_experts(name: str, config: RunConfig) -> str:
    """A parameter's name with an expert's number among all, not among those of this rank."""
    from megatron.core import parallel_state

    match = EXPERT.fullmatch(name)
    if match is None or config.model.num_experts is None:
        return name
    here = config.model.num_experts // config.trainer.expert_parallel
    first = parallel_state.get_expert_model_parallel_rank() * here
    return f"{match[1]}{first + int(match[2])}{match[3]}"


def _draw_shard(name: str, parameter: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Draw the whole matrix and cut this rank's part, as Megatron's layers describe themselves."""
    from megatron.core import parallel_state

    if EXPERT.fullmatch(name):
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = group.size(), group.rank()
    dim = int(getattr(parameter, "partition_dim", -1))
    if dim == -1:  # a router, which every rank has whole
        return torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
    stride = int(parameter.partition_stride)  # type: ignore[attr-defined]
    shape = list(parameter.shape)
    shape[dim] *= ranks
    whole = torch.empty(shape).normal_(0.0, std, generator=generator)
    pieces = whole.chunk(ranks * stride, dim=dim)  # stride 2: gate rows, then up rows
    return torch.cat(pieces[rank::ranks], dim=dim)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
