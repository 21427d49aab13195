"""What a rollout engine is started with: the model, the arm, its numerics and its limits.

The settings give the quantization plan that trainer and engine share, and the arguments of
``vllm.LLM`` that go with it; ``rollout.py`` starts an engine from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8rl.config.rollout import (
    BF16_WEIGHTS,
    FP8_CACHE,
    Activations,
    Precision,
    refuse_unfit_rollout,
)
from fp8rl.errors import ConfigError
from fp8rl.quant import QuantPlan, RouterPrecision, ScaleFormat, WeightPrecision
from fp8rl.sync.plugin import W8A8


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with.

    hf_config: the model's config.json without quantization. precision: which arm. max_model_len:
    prompt and response, tokens. max_num_seqs: sequences decoded at once. kv_cache_bytes: memory of
    the KV cache, of each worker. tensor_parallel: workers. seed: of vLLM itself; requests carry
    their own. activations: in what FP8 layers take their input; None is what vLLM's kernels do,
    "bf16" on a CPU and "fp8" on CUDA, where nothing else can be had. scale_format: of the scales of
    FP8 weights, and router: of the routers' weights, see ``QuantPlan``.

    Raises ConfigError for a choice that this precision or this device does not have.
    """

    hf_config: Mapping[str, Any]
    precision: Precision
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    tensor_parallel: int = 1
    seed: int = 0
    activations: Activations | None = None
    scale_format: ScaleFormat = "pow2"
    router: RouterPrecision = "bf16"

    def __post_init__(self) -> None:
        """Refuse what this engine could not be."""
        refuse_unfit_rollout(self.precision, self.activations, self.scale_format)
        if self.activations == "bf16" and torch.cuda.is_available():
            raise ConfigError(
                "rollout.activations is bf16, but on CUDA vLLM's FP8 kernels quantize their "
                "input: use rollout.activations=fp8, or leave it out"
            )

    def plan(self) -> QuantPlan:
        """The quantization plan that trainer and engine share."""
        weights: WeightPrecision = "bf16" if self.precision in BF16_WEIGHTS else "fp8"
        return QuantPlan.from_hf_config(
            self.hf_config,
            weights=weights,
            tensor_parallel=self.tensor_parallel,
            scale_format=self.scale_format,
            router=self.router,
        )

    @property
    def fp8_kv(self) -> bool:
        """Whether the KV cache is FP8 and needs scales with every update."""
        return self.precision in FP8_CACHE

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        """Write ``config.json`` into ``model_dir``; return the arguments of ``vllm.LLM``."""
        model_dir.mkdir(parents=True, exist_ok=True)
        config = dict(self.hf_config)
        quantization = self.plan().quantization_config()
        if quantization is not None:
            config["quantization_config"] = quantization
        (model_dir / "config.json").write_text(json.dumps(config, indent=2))
        ours = self.activations == "fp8" and not torch.cuda.is_available()
        return {
            "model": str(model_dir),
            "dtype": "bfloat16",
            "quantization": W8A8 if ours else None,  # None: what config.json says
            "kv_cache_dtype": "fp8" if self.fp8_kv else "auto",
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": True,
            "seed": self.seed,
            # vLLM 0.32 samples from a part of a prompt too, and turns the request's generator back,
            # which a CPU's cannot be
            "enable_chunked_prefill": torch.cuda.is_available(),
        }
