"""The policy that `fp8rl bench sync` moves: random weights of a given shape, and steps of theirs.

    masters    fp32: N(0, 0.02), norms 1; a step moves each of them by 0.3 to 1 times the learning
               rate 1e-6, as AdamW does where gradients are mostly noise (density_simulated.py)
    weights    their BF16 copies, under Hugging Face names: what a trainer has and publishes

All weights move in every step. In real training the rows of an embedding whose tokens do not occur
stay as they are, so that deltas come out smaller there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8rl.bench.density_simulated import adam_update
from fp8rl.config.model import ModelConfig
from fp8rl.engine.settings import EngineSettings
from fp8rl.quant import QuantPlan
from fp8rl.trainer.megatron_model import hf_config

SIGMA, LEARNING_RATE = 0.02, 1e-6
MAX_TOKENS = 512  # of a sequence; nothing is generated
LIMITS = (MAX_TOKENS, 4, 2**27)  # of an engine: tokens, sequences, bytes of the KV cache
CHUNK = 2**22  # weights whose step is drawn at once
PROCESS_BYTES = 10**9  # that a process with torch and vLLM takes for itself


class OnlineSettings(EngineSettings):
    """An engine that reads a BF16 checkpoint and quantizes its linears in blocks by itself.

    vLLM 0.32 can do that on a CPU too, with fp32 scales.
    """

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        """As for ours, but for where the weights come from."""
        online = {
            "load_format": "auto",
            "quantization": "fp8_per_block",
            "weight_transfer_config": None,
        }
        return super().llm_arguments(model_dir) | online


@dataclass(frozen=True)
class Shape:
    """A model by its sizes."""

    name: str
    model: ModelConfig
    vocabulary: int
    tied: bool

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        config = hf_config(self.model, self.vocabulary, MAX_TOKENS)
        return config | {"tie_word_embeddings": self.tied}

    def settings(self) -> EngineSettings:
        """The engine that FP8 weights are loaded into; its cache is BF16."""
        return EngineSettings(self.config(), "fp8", *LIMITS)

    def online(self) -> OnlineSettings:
        """The engine that reads BF16 and quantizes."""
        return OnlineSettings(self.config(), "bf16", *LIMITS)

    def sizes(self) -> Sizes:
        """Count its weights, and their bytes."""
        plan = self.settings().plan()
        engine = sum(math.prod(t.shape) * t.dtype.itemsize for t in plan.engine_tensors())
        weights = [(entry, math.prod(entry.shape)) for entry in plan.entries]
        quantized = sum(count for entry, count in weights if entry.quantized)
        return Sizes(sum(count for _, count in weights), quantized, engine)

    def described(self) -> str:
        """In words, for the result."""
        model, tied = self.model, "tied" if self.tied else "untied"
        return (
            f"{model.num_layers} layers, hidden {model.hidden_size}, FFN {model.ffn_hidden_size}, "
            f"{model.num_heads} query and {model.num_kv_heads} kv heads of {model.head_dim}, "
            f"vocabulary {self.vocabulary}, {tied}"
        )


@dataclass(frozen=True)
class Sizes:
    """How many weights, how many of them in FP8, and the bytes of all as the engine has them."""

    weights: int
    quantized: int
    engine_bytes: int

    @property
    def bf16_bytes(self) -> int:
        """Bytes of all weights in BF16."""
        return 2 * self.weights

    def memory_needed(self) -> int:
        """Bytes that the bench takes at its highest, roughly: one trainer and three engines.

        Masters and BF16 copies; the ledger and the bytes in shared memory; in the engines weights,
        mirrors, what is received and what is loaded of it.
        """
        trainer = 6 * self.weights + 2 * self.engine_bytes
        return trainer + 10 * self.engine_bytes + 4 * PROCESS_BYTES


SHAPES = {
    "0.3b": Shape(
        "0.3B",
        ModelConfig(
            num_layers=20,
            hidden_size=1024,
            ffn_hidden_size=3072,
            num_heads=16,
            num_kv_heads=8,
            head_dim=64,
        ),
        vocabulary=32_768,
        tied=False,
    ),
    "qwen3-0.6b": Shape(
        "Qwen3-0.6B",
        ModelConfig(
            num_layers=28,
            hidden_size=1024,
            ffn_hidden_size=3072,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
        ),
        vocabulary=151_936,
        tied=True,
    ),
    "tiny": Shape("tiny", ModelConfig(num_layers=2), vocabulary=256, tied=False),
}


class Policy:
    """Masters and their BF16 copies, ``weights``, which a step changes in place."""

    def __init__(self, plan: QuantPlan) -> None:
        """Draw them for every entry of a plan, always the same."""
        self._generator = torch.Generator().manual_seed(0)
        self._masters = {entry.name: self._draw(entry.shape) for entry in plan.entries}
        self.weights: Mapping[str, Tensor] = {
            name: master.bfloat16() for name, master in self._masters.items()
        }

    def step(self) -> None:
        """Take one optimizer step."""
        for name, master in self._masters.items():
            for chunk in torch.split(master.view(-1), CHUNK):
                chunk += adam_update(chunk, LEARNING_RATE, self._generator)
            self.weights[name].copy_(master)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.randn(shape, generator=self._generator).mul_(SIGMA)
