"""Small models of every family: config, checkpoint, transformers model, and GPTModel in any layout.

What has no CPU build is stood in for (``megatron_stand_ins.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8rl.quant.architectures import checkpoint_tensors
from fp8rl.trainer.megatron_cpu import cpu_stands_in, use_still_rng_tracker
from tests.sync.megatron_settings import LAYERS, Layout, transformer_config
from tests.sync.megatron_stand_ins import (
    GroupedColumns,
    GroupedRows,
    LatentAttention,
    NormThenLinear,
    WholeLinear,
    grouped_matmul,
)

VOCAB, WIDTH = 120, 12

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


def _family(architecture: str, model_type: str, **keys: Any) -> dict[str, Any]:
    return _SIZES | {"architectures": [architecture], "model_type": model_type} | keys


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _family("LlamaForCausalLM", "llama"),
    "llama with biases": _family(
        "LlamaForCausalLM", "llama", attention_bias=True, mlp_bias=True
    ),
    "qwen2": _family("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True),
    "qwen3": _family("Qwen3ForCausalLM", "qwen3", head_dim=64),
    "qwen3-moe": _family(
        "Qwen3MoeForCausalLM", "qwen3_moe", head_dim=64, num_experts=4, mlp_only_layers=[1],
        decoder_sparse_step=1, **_EXPERTS,
    ),
    "mixtral": _family(
        "MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek-v3": _family(
        "DeepseekV3ForCausalLM", "deepseek_v3", num_key_value_heads=4, n_routed_experts=4,
        n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=96,
        qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64, n_group=1, topk_group=1,
        topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=1.5, **_EXPERTS,
    ),
}  # fmt: skip
MOE = ("qwen3-moe", "mixtral", "deepseek-v3")


def checkpoint(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the model, random but fixed, BF16 but for an expert bias."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for t in checkpoint_tensors(config):
        noise = torch.randn(t.shape, generator=generator)
        value = 0.08 * noise
        if t.role == "norm":
            value = 1 + 0.1 * noise
        elif t.role == "router":
            value = 0.3 * noise
        tensors[t.name] = value.to(t.dtype)
    return tensors


def tokens() -> Tensor:
    """Two rows of tokens of the real vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (2, WIDTH), generator=generator)


def hugging_face(config: dict[str, Any], tensors: dict[str, Tensor], folder: Any) -> nn.Module:
    """The model of transformers, from a folder that holds these tensors as a checkpoint does.

    Every tensor must be wanted, and none be left.
    """
    import json

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    save_file({n: t.clone().contiguous() for n, t in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert type(model).__name__ == config["architectures"][0]
    assert not any(report.values()), report
    return model.eval()


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Megatron's parallel state for a layout, and what makes it run on a CPU."""
    import megatron.core.transformer.moe.grouped_gemm_util as grouped
    from megatron.core import parallel_state
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    use_still_rng_tracker()
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(cpu_stands_in())
        enter(torch.compiler.set_stance("force_eager"))
        enter(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))
        enter(mock.patch.object(Tensor, "cuda", lambda tensor: tensor))  # a tied head's copy
        enter(mock.patch.object(multi_latent_attention, "TELinear", WholeLinear))
        enter(mock.patch.object(grouped, "grouped_gemm", object()))
        enter(mock.patch.object(grouped, "ops", SimpleNamespace(gmm=grouped_matmul)))
        yield
    parallel_state.destroy_model_parallel()


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with laid_out(Layout()):
        yield
    dist.destroy_process_group()


def gpt_chunks(config: dict[str, Any], layout: Layout = Layout(), **settings: Any) -> list[Any]:  # noqa: B008
    """This rank's GPTModel, or its chunks, with Megatron's own random weights."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage

    stages = range(layout.chunks) if layout.chunks > 1 else [None]
    chunks = []
    with torch.random.fork_rng(devices=[]):
        for vp_stage in stages:
            whole = transformer_config(config, layout, **settings)
            stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
            model = GPTModel(
                config=whole,
                transformer_layer_spec=_spec(whole, layout, vp_stage),
                vocab_size=layout.padded,
                max_sequence_length=64,
                pre_process=is_pipeline_first_stage(**stage),
                post_process=is_pipeline_last_stage(**stage),
                share_embeddings_and_output_weights=config["tie_word_embeddings"],
                position_embedding_type="rope",
                rotary_base=10000,
                vp_stage=vp_stage,
            )
            chunks.append(model.bfloat16().eval())
    return chunks


def _spec(config: Any, layout: Layout, vp_stage: int | None) -> Any:
    """Layers of the local spec; with Transformer Engine's names where the layout says so."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    for spec in block.layer_specs:
        layer, moe = spec.submodules, hasattr(spec.submodules.mlp.submodules, "experts")
        attention = layer.self_attention.submodules
        if config.multi_latent_attention:
            attention.core_attention = LatentAttention
        if layout.fused and config.multi_latent_attention:
            attention.q_layernorm = attention.kv_layernorm = IdentityOp
            attention.linear_q_up_proj = attention.linear_kv_up_proj = NormThenLinear
            attention.linear_q_down_proj = attention.linear_kv_down_proj = WholeLinear
        elif layout.fused:
            layer.input_layernorm = IdentityOp
            attention.linear_qkv = NormThenLinear
        if layout.fused and not moe:
            layer.pre_mlp_layernorm = IdentityOp
            layer.mlp.submodules.linear_fc1 = NormThenLinear
        if moe and layout.experts == "grouped":
            linears = MLPSubmodules(linear_fc1=GroupedColumns, linear_fc2=GroupedRows)
            layer.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    return block


def logits(chunks: list[Any]) -> Tensor | None:
    """Logits [2, WIDTH, VOCAB] of ``tokens()`` through the pipeline, on its last stage.

    The model's BF16 weights become fp32 ones, so that rounding hides nothing.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    for module in (m for chunk in chunks for m in chunk.float().modules()):
        if hasattr(module, "input_in_float16"):  # the softmax's cast back to BF16
            module.input_in_float16 = False
    chunks[0].config.pipeline_dtype = torch.float32
    rows = tokens()
    causal = torch.ones(1, 1, WIDTH, WIDTH, dtype=torch.bool).triu(1)

    def forward(data: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        micro = next(data)
        positions = torch.arange(WIDTH).expand_as(micro)
        return model(micro, positions, causal), lambda found, non_loss_data: found

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(rows.split(1)) for _ in chunks],
            model=chunks,
            num_microbatches=2,
            seq_length=WIDTH,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        whole = gather_from_tensor_model_parallel_region(torch.cat(found))
    return whole[..., :VOCAB]
