"""The model that `fp8rl bench rollout` lets engines serve: a checkpoint, or random weights.

    random      W ~ N(0, 0.02), norms 1, in BF16; drawn once and kept
    checkpoint  read anew for each engine, tensor by tensor; what is not BF16 is rounded to it

What the machine cannot hold is cut: layers go from the top until an engine fits, and the model's
description says how many are left of how many. Time per layer and per token stays what it is;
embedding and head weigh more than in the whole model.

Left out: checkpoints that are quantized already (convert them back: fp8rl quantize --to bf16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from fp8rl.bench import sync_model
from fp8rl.bench.sync_model import PROCESS_BYTES, SIGMA, Shape
from fp8rl.config.model import ModelConfig
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import ConfigError
from fp8rl.quant import QuantPlan
from fp8rl.quant.checkpoint import Checkpoint
from fp8rl.sync import IterableSource

ENGINE_COPIES = 5.0  # of the weights in an engine: packed, mirrored, received, loaded, the ring
CUDA_COPIES = 2.0  # of them in host memory where the others lie on a GPU
DEVICE_SHARE = 0.75  # of a GPU's memory that weights may take

SHAPES = sync_model.SHAPES | {
    "qwen3-8b": Shape(
        "Qwen3-8B",
        ModelConfig(
            num_layers=36,
            hidden_size=4096,
            ffn_hidden_size=12_288,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
        ),
        vocabulary=151_936,
        tied=False,
    ),
    "qwen3-30b-a3b": Shape(
        "Qwen3-30B-A3B",
        ModelConfig(
            family="qwen3_moe",
            num_layers=48,
            hidden_size=2048,
            ffn_hidden_size=6144,
            num_experts=128,
            experts_per_token=8,
            moe_ffn_hidden_size=768,
            num_heads=32,
            num_kv_heads=4,
            head_dim=128,
        ),
        vocabulary=151_936,
        tied=False,
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model by its config.json, which may have fewer layers than ``all_layers``."""

    name: str
    config: Mapping[str, Any]
    all_layers: int
    checkpoint: Checkpoint | None = None

    @classmethod
    def of_shape(cls, name: str, max_positions: int) -> Self:
        """Random weights of a shape of ``SHAPES``."""
        shape = SHAPES[name]
        config = shape.config() | {"max_position_embeddings": max_positions}
        return cls(shape.name, config, shape.model.num_layers)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Self:
        """A checkpoint; CheckpointFormatError where it is none, ConfigError where it is FP8."""
        checkpoint = Checkpoint.open(folder)
        if "quantization_config" in checkpoint.config:
            raise ConfigError(
                f"{folder} is quantized already, and the arms are made from BF16 weights: give the "
                f"original, or make it: fp8rl quantize {folder} FOLDER --to bf16"
            )
        layers = int(checkpoint.config["num_hidden_layers"])
        return cls(folder.resolve().name, checkpoint.config, layers, checkpoint)

    @property
    def layers(self) -> int:
        """Layers that are left."""
        return int(self.config["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.config["vocab_size"])

    def described(self) -> str:
        """Name, and in plain words what was cut of it."""
        kind = "random weights" if self.checkpoint is None else "checkpoint"
        if self.layers == self.all_layers:
            return f"{self.name}, {kind}"
        return f"{self.name}, CUT to {self.layers} of {self.all_layers} layers, {kind}"

    def cut(self, layers: int) -> Self:
        """The same model with its first layers only."""
        config = dict(self.config) | {"num_hidden_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
        return replace(self, config=config)

    def weights(self) -> int:
        """How many weights it has."""
        return sum(math.prod(entry.shape) for entry in self._plan().entries)

    def engine_bytes(self, settings: EngineSettings) -> int:
        """Bytes of the weights as that engine holds them."""
        tensors = settings.plan().engine_tensors()
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of a token in BF16, all layers."""
        heads = int(self.config.get("num_key_value_heads", self.config["num_attention_heads"]))
        default = int(self.config["hidden_size"]) // int(self.config["num_attention_heads"])
        width = int(self.config.get("head_dim") or default)
        return 2 * 2 * self.layers * heads * width

    def source(self) -> IterableSource:
        """Its weights, as BF16."""
        plan = self._plan()
        if self.checkpoint is not None:
            checkpoint = self.checkpoint
            return IterableSource(lambda: _read(checkpoint, {entry.name for entry in plan.entries}))
        generator = torch.Generator().manual_seed(0)
        return IterableSource({e.name: _draw(e.shape, generator) for e in plan.entries})

    def _plan(self) -> QuantPlan:
        return QuantPlan.from_hf_config(self.config, weights="bf16")


def host_bytes(subject: Subject, engines: Sequence[EngineSettings], *, cuda: bool) -> int:
    """Bytes of host memory that trainer and engines take together at their highest, roughly."""
    trainer = PROCESS_BYTES + (0 if subject.checkpoint else 2 * subject.weights())
    copies = CUDA_COPIES if cuda else ENGINE_COPIES
    each = [round(copies * subject.engine_bytes(engine)) + PROCESS_BYTES for engine in engines]
    caches = 0 if cuda else sum(engine.kv_cache_bytes for engine in engines)
    return trainer + sum(each) + caches


def fitted(
    subject: Subject, engine: Callable[[Subject], EngineSettings], available: int, *, cuda: bool
) -> Subject:
    """The subject, cut until trainer and one engine fit that host memory.

    Raises ConfigError where not even one layer does.
    """

    def fits(layers: int) -> bool:
        model = subject.cut(layers)
        return host_bytes(model, [engine(model)], cuda=cuda) <= available

    return _largest(subject, fits, f"{available / 2**30:.1f} GiB of memory")


def fitted_to_device(subject: Subject, available: int) -> Subject:
    """The subject, cut until its BF16 weights leave room on a GPU of that memory."""

    def fits(layers: int) -> bool:
        return 2 * subject.cut(layers).weights() <= DEVICE_SHARE * available

    return _largest(subject, fits, f"{available / 2**30:.1f} GiB on the GPU")


def _largest(subject: Subject, fits: Callable[[int], bool], memory: str) -> Subject:
    for layers in range(subject.all_layers, 0, -1):
        if fits(layers):
            return subject.cut(layers)
    raise ConfigError(
        f"not even one layer of {subject.name} fits the free {memory}; choose a smaller --shape, "
        "fewer or shorter sequences (--batches, --lengths), or end what else takes memory"
    )


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, SIGMA, generator=generator)


def _read(checkpoint: Checkpoint, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for shard in checkpoint.shards:
        with safe_open(shard.path, framework="pt") as file:
            for stored in shard.tensors:
                if stored.name in names:
                    yield stored.name, file.get_tensor(stored.name).bfloat16()
