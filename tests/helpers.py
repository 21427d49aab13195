"""What several tests share: a small Qwen3 in Hugging Face form, random but fixed."""

from __future__ import annotations

from typing import Any

import torch

from fp8rl.engine.settings import EngineSettings
from fp8rl.quant import KVScales, QuantPlan
from fp8rl.sync.source import IterableSource

LAYERS = 2
EOS = 1


def hf_config(
    vocab_size: int = 64, max_positions: int = 512, family: str = "qwen3"
) -> dict[str, Any]:
    """config.json of a 2-layer Qwen3 or Qwen2, 256 wide, 4 query and 2 key/value heads of 64."""
    return {
        "architectures": [f"{family.title()}ForCausalLM"],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    }


def weights(
    seed: int, family: str = "qwen3", config: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of the model, BF16; seeds give different policies."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in QuantPlan.from_hf_config(config or hf_config(family=family)).entries:
        noise = torch.randn(entry.shape, generator=generator)
        value = 1 + 0.1 * noise if len(entry.shape) == 1 else 0.08 * noise
        tensors[entry.name] = value.to(torch.bfloat16)
    return tensors


def source(seed: int, family: str = "qwen3") -> IterableSource:
    """The weights of ``seed`` as a source."""
    return IterableSource(weights(seed, family))


def scales(version: int, factor: float = 1.0) -> KVScales:
    """KV scales of that version; different for every layer and for q, k, v."""
    amax = factor * (4.0 + torch.arange(LAYERS * 3, dtype=torch.float32).reshape(LAYERS, 3) * 3)
    return KVScales.from_amax(amax, version=version, tokens=100)


def settings(
    precision: str = "fp8-kv",
    max_model_len: int = 512,
    family: str = "qwen3",
    tensor_parallel: int = 1,
) -> EngineSettings:
    """A small engine; of several workers with as many key/value heads as query heads."""
    config = hf_config(family=family)
    if tensor_parallel > 1:  # a worker's part of k and v must be whole blocks
        config["num_key_value_heads"] = config["num_attention_heads"]
    return EngineSettings(
        hf_config=config,
        tensor_parallel=tensor_parallel,
        precision=precision,  # type: ignore[arg-type]
        max_model_len=max_model_len,
        max_num_seqs=16,
        kv_cache_bytes=64 * 2**20,
    )
