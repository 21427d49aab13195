"""The hook's cost: a trainer's forward alone, and watched by a KV observer, side by side.

A few layers of a model's shape with as large a part of its vocabulary, so that layers and head are
in proportion; random BF16 weights, rows padded by a tenth. Once as megatron-core's GPTModel and
once as transformers' own model. A watched forward includes all that a step pays: the observer is
made, the hooks put on, and what was seen is read out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8rl.bench.timing import take_turns
from fp8rl.config.model import VOCAB_MULTIPLE, ModelConfig
from fp8rl.config.run import RunConfig
from fp8rl.quant import KVObserver, KVScales
from fp8rl.sync.qkv_hugging_face import HuggingFaceQKV
from fp8rl.sync.qkv_megatron import MegatronQKV
from fp8rl.sync.qkv_source import QKVSource
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from fp8rl.trainer.megatron_model import build_model, hf_config

ALONE = "alone"
AMAX, PERCENTILE, RATES = "amax", "percentile", "amax and rates"  # rates: what scales in use clip
QWEN3_VOCABULARY = 151_936
FULL = 0.9  # share of a row that is no padding


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that is run through it: ``rows`` x ``time`` tokens."""

    name: str
    model: ModelConfig
    vocabulary: int
    rows: int
    time: int

    def described(self) -> str:
        """In words, for the result."""
        model = self.model
        return (
            f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} query and "
            f"{model.num_kv_heads} kv heads of {model.head_dim}, vocabulary {self.vocabulary}; "
            f"{self.rows} x {self.time} tokens"
        )


def _part_of_vocabulary(kept: int, layers: int) -> int:
    """Qwen3's vocabulary in proportion to the layers that are kept, in whole multiples."""
    return QWEN3_VOCABULARY * kept // layers // VOCAB_MULTIPLE * VOCAB_MULTIPLE


QWEN3_0_6B = ModelConfig(
    num_layers=4,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
)
QWEN3_8B = ModelConfig(
    num_layers=2,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
)
SHAPES = {
    "demo": Shape("demo", ModelConfig(), VOCAB_MULTIPLE, rows=32, time=16),
    "qwen3-0.6b": Shape("Qwen3-0.6B", QWEN3_0_6B, _part_of_vocabulary(4, 28), rows=2, time=256),
    "qwen3-8b": Shape("Qwen3-8B", QWEN3_8B, _part_of_vocabulary(2, 36), rows=2, time=256),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a forward in each round: alone, and in each way of watching it."""

    model: str
    trainer: str
    seconds: dict[str, list[float]]

    @property
    def alone(self) -> list[float]:
        """Nobody watches."""
        return self.seconds[ALONE]

    @property
    def watched(self) -> dict[str, list[float]]:
        """The others."""
        return {way: seconds for way, seconds in self.seconds.items() if way != ALONE}


@dataclass(frozen=True)
class _Trainer:
    """A model as one trainer has it: how it is watched, and a forward of it."""

    name: str
    source: QKVSource
    forward: Callable[[Tensor], object]


def bench_forward(
    shape: Shape,
    rounds: int,
    started: Callable[[str], None] = lambda _: None,
) -> Iterator[Timing]:
    """Measure one shape in each trainer; `started` hears which."""
    tokens, real = _batch(shape)
    for opened in (_megatron, _hugging_face):
        with opened(shape) as trainer, torch.no_grad():
            started(f"{shape.name}, {trainer.name}")
            ways = _ways(trainer, tokens, real)
            seconds = take_turns(ways, rounds, torch.device("cpu"))
            yield Timing(shape.name, trainer.name, seconds)


def _batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are real: bool, both [rows, time]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocabulary, (shape.rows, shape.time), generator=generator)
    real = (torch.arange(shape.time) < FULL * shape.time).expand(shape.rows, -1)
    return tokens, real


def _ways(trainer: _Trainer, tokens: Tensor, real: Tensor) -> dict[str, Callable[[], object]]:
    """What takes turns."""

    def watched(**settings: Any) -> KVObserver:
        observer = KVObserver(trainer.source.shape, **settings)
        with trainer.source.watch(observer) as watch:
            watch.token_mask = real
            trainer.forward(tokens)
        return observer

    first = watched().observation()
    scales = KVScales.from_amax(first.amax(), version=0, tokens=first.tokens)
    return {
        ALONE: lambda: trainer.forward(tokens),
        AMAX: lambda: watched().observation().amax(),
        PERCENTILE: lambda: watched(histogram=True).observation().percentile(99.99),
        RATES: lambda: watched(in_use=scales).observation().saturation(),
    }


@contextmanager
def _megatron(shape: Shape) -> Iterator[_Trainer]:
    config = RunConfig(model=shape.model)
    with init_distributed(config), cpu_stands_in():
        model = build_model(config, shape.vocabulary)
        causal = torch.ones(1, 1, shape.time, shape.time, dtype=torch.bool).triu(1)
        positions = torch.arange(shape.time).expand(shape.rows, -1)
        source = MegatronQKV(model)
        yield _Trainer("Megatron", source, lambda tokens: model(tokens, positions, causal))


@contextmanager
def _hugging_face(shape: Shape) -> Iterator[_Trainer]:
    from transformers import AutoConfig, AutoModelForCausalLM

    described = hf_config(shape.model, shape.vocabulary, shape.time)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**described), dtype=torch.bfloat16
    )
    source = HuggingFaceQKV(model)
    yield _Trainer("transformers", source, lambda tokens: model(tokens, use_cache=False))
