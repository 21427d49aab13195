"""Real vLLM models without an engine around them, small and quick to build; weights for them.

A model is built by vLLM's own loader in about half a second, in this process. Whoever imports this
runs in a process of its own: vLLM keeps its distributed groups and its settings in globals.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8rl.engine.channel import ENVIRONMENT
from fp8rl.quant import QuantPlan, quantize_blockwise

os.environ.update(ENVIRONMENT)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
MOE = {
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# No multiple of what vLLM pads to, and a head of more than 1 MiB, which oneDNN multiplies by.
VOCABULARY = 2100


def config(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of a 2-layer model, 256 wide, 2 query heads and 1 key/value head of 128."""
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        **MOE.get(family, {}),
        **changes,
    }


def sent(plan: QuantPlan, seed: int) -> dict[str, torch.Tensor]:
    """Every weight as it is sent: FP8 with scales, or BF16; seeds give different policies.

    From seed to seed the weights grow twofold, so that all scales differ too.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in plan.entries:
        noise = torch.randn(entry.shape, generator=generator)
        value = (1 + 0.1 * noise if len(entry.shape) == 1 else 0.02 * 2**seed * noise).to(
            torch.bfloat16
        )
        if entry.quantized:
            quantized = quantize_blockwise(value)
            tensors |= {entry.name: quantized.data, f"{entry.name}_scale_inv": quantized.scale_inv}
        else:
            tensors[entry.name] = value.to(entry.dtype)
    return tensors


def write_config(hf_config: dict[str, Any], plan: QuantPlan, folder: Path) -> None:
    """Write ``config.json`` as an engine that follows the plan starts from it."""
    quantization = plan.quantization_config()
    extra = {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(hf_config | extra))


@dataclass
class Live:
    """A vLLM model, what it was planned as, and its config."""

    plan: QuantPlan
    vllm_config: Any
    model: Any

    @property
    def model_config(self) -> Any:
        return self.vllm_config.model_config


def build(
    hf_config: dict[str, Any],
    precision: str,
    kv_cache: str = "fp8",
    quantization: str | None = None,
) -> Live:
    """Build the model with random weights; ``precision`` is "fp8" or "bf16"."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    plan = QuantPlan.from_hf_config(hf_config, weights=precision)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        write_config(hf_config, plan, Path(folder))
        vllm_config = EngineArgs(
            model=folder,
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            quantization=quantization,
            kv_cache_dtype=kv_cache,
            max_model_len=128,
        ).create_engine_config()
        with set_current_vllm_config(vllm_config):
            destroy_model_parallel()  # of the model before, whose groups may be others
            if not torch.distributed.is_initialized():
                address = f"tcp://127.0.0.1:{_free_port()}"
                init_distributed_environment(1, 0, address, 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            return Live(plan, vllm_config, get_model(vllm_config=vllm_config))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
