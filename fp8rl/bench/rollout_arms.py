"""The arms of `fp8rl bench rollout`: engines that get the same weights and the same requests.

    bf16       nothing is FP8
    fp8        weights; on a CPU W8A16, as vLLM's kernels are there, on CUDA W8A8
    fp8-w8a8   on a CPU alone: with activations rounded to FP8 as a GPU's kernels round them
    kv-only    the KV cache
    fp8-kv     weights and KV cache

An arm is a process of ours, started for the round, whose weights came through a ``Publisher``: what
is measured is what a run gets, behaviour log-probs and proof included. Every response has exactly
the tokens that were asked for, sampled at temperature 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from fp8rl.bench import memory
from fp8rl.config.rollout import Activations, Precision
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError
from fp8rl.quant import KVCalibrator, KVScaleRule
from fp8rl.quant.kv_scales import KVScales
from fp8rl.sync import IterableSource, Publisher

BF16, FP8, W8A8, KV_ONLY, FP8_KV = "bf16", "fp8", "fp8-w8a8", "kv-only", "fp8-kv"
ARMS: dict[str, tuple[Precision, Activations | None]] = {
    BF16: ("bf16", None),
    FP8: ("fp8", None),
    W8A8: ("fp8", "fp8"),
    KV_ONLY: ("kv-only", None),
    FP8_KV: ("fp8-kv", None),
}
CALIBRATION_TOKENS = 512  # as a run's kv_scales.calibration_tokens
WARMUP_TOKENS = 4

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ArmSettings(EngineSettings):
    """An engine that takes times; on CUDA one with graphs, and a share of the GPU's memory.

    gpu_memory: vLLM's gpu_memory_utilization, in place of ``kv_cache_bytes``; None on a CPU.
    """

    gpu_memory: float | None = None

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        """As ours, and those."""
        arguments = super().llm_arguments(model_dir) | {"disable_log_stats": False}
        if self.gpu_memory is None:
            return arguments
        return arguments | {
            "enforce_eager": False,
            "gpu_memory_utilization": self.gpu_memory,
            "kv_cache_memory_bytes": None,
        }


@dataclass(frozen=True)
class FixedLength(Sampling):
    """Exactly ``max_tokens`` tokens, whatever they are."""

    stop_token: int = -1  # none

    def parameters(self) -> dict[str, Any]:
        """As keyword arguments of ``vllm.SamplingParams``."""
        return {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
        }


@dataclass(frozen=True)
class Point:
    """What is measured: ``batch`` responses of ``tokens`` tokens at once.

    update_every: rollouts of that kind after each weight update, whose time counts too; 0 without.
    """

    batch: int
    tokens: int
    update_every: int = 0


@dataclass(frozen=True)
class Turn:
    """One arm at one point, once. Times are seconds.

    first, each: time to first token and per output token, of each request. core_seconds: time that
    the engine's threads computed; None on CUDA. update: publishing, recalibration included.
    recalibration: measuring KV scales, of that.
    """

    arm: str
    point: Point
    seconds: float
    first: list[float]
    each: list[float]
    preemptions: int
    core_seconds: float | None
    update: float = 0.0
    recalibration: float = 0.0

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return self.point.batch * self.point.tokens * max(1, self.point.update_every)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Make one from what ``to_json`` returned."""
        return cls(**(value | {"point": Point(**value["point"])}))


@dataclass(frozen=True)
class Round:
    """Turns of all arms at all points, memory by arm, and the machine's load (1 minute) before."""

    turns: list[Turn]
    memory: dict[str, dict[str, int | None]]
    load: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Make one from what ``to_json`` returned."""
        turns = [Turn.from_json(turn) for turn in value["turns"]]
        return cls(turns, value["memory"], value["load"])


class MeasuredEngine(RolloutEngine):
    """An engine that tells its times."""

    def __init__(self, settings: ArmSettings, folder: Path) -> None:
        """Start it; its log goes into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(settings, folder, module="fp8rl.bench.rollout_engine")

    def timings(self) -> dict[str, Any]:
        """Of the requests that were collected last, see ``rollout_engine.py``."""
        found: dict[str, Any] = self._call("timings")
        return found

    def memory(self) -> dict[str, int]:
        """Bytes and tokens of the KV cache, and bytes in use on the GPU."""
        found: dict[str, int] = self._call("memory")
        return found


@dataclass
class Arm:
    """A running arm; close it by the stack that it was given."""

    name: str
    settings: ArmSettings
    source: IterableSource
    folder: Path
    stack: ExitStack
    version: int = 0
    engine: MeasuredEngine = field(init=False)

    def __post_init__(self) -> None:
        """Start the process; ``open`` waits for it."""
        self.engine = self.stack.enter_context(MeasuredEngine(self.settings, self.folder))

    def open(self, prompts: Prompts, batches: Sequence[int]) -> None:
        """Publish the first version, and let every batch size decode a few tokens."""
        layers = int(self.settings.hf_config["num_hidden_layers"]) if self.settings.fp8_kv else 0
        publisher = Publisher(self.settings.plan(), self.engine, kv_layers=layers)
        self._publisher = self.stack.enter_context(publisher)
        self.update(prompts)
        for batch in sorted(set(batches)):
            few = [list(prompt[:WARMUP_TOKENS]) for prompt in prompts[:batch]]
            self._generate(few, WARMUP_TOKENS, seed=0)

    def update(self, prompts: Prompts) -> tuple[float, float]:
        """Publish the next version; tells the seconds of that, and of measuring scales in it."""
        began, version = time.perf_counter(), self.version + 1

        def measure() -> KVScales:
            rows = max(1, CALIBRATION_TOKENS // len(prompts[0]))
            seen = self.engine.observe_kv(prompts[:rows], histogram=False)
            return KVCalibrator(KVScaleRule(), seen.shape).scales(seen, version)

        scales = measure if self.settings.fp8_kv else None
        report = self._publisher.publish(self.source, version=version, kv_scales=scales)
        assert report is not None  # this process has the engine
        self.version = version
        return time.perf_counter() - began, report.kv_seconds

    def turn(self, point: Point, rollouts: Sequence[Prompts], seed: int) -> Turn:
        """Measure a point, by one batch of prompts for each rollout of it."""
        process, preemptions = psutil.Process(self.engine.pid), 0
        first: list[float] = []
        each: list[float] = []
        used, began, updating = _cpu(process), time.perf_counter(), (0.0, 0.0)
        if point.update_every:
            updating = self.update(rollouts[0])
        for prompts in rollouts:
            self._generate(prompts, point.tokens, seed)
            times = self.engine.timings()
            first += times["first"]
            each += times["each"]
            preemptions += times["preemptions"]
        seconds = time.perf_counter() - began
        cores = None if self.settings.gpu_memory else _cpu(process) - used
        return Turn(self.name, point, seconds, first, each, preemptions, cores, *updating)

    def memory(self) -> dict[str, int | None]:
        """Bytes of weights and KV cache, tokens of the cache, and the most that was resident."""
        peak = memory.high_water_mark(self.engine.pid) if memory.can_tell() else None
        return {**self.engine.memory(), "resident_bytes": peak}

    def _generate(self, prompts: Prompts, tokens: int, seed: int) -> None:
        sampling = FixedLength(max_tokens=tokens)
        groups = self.engine.generate(prompts, version=self.version, sampling=sampling, seed=seed)
        given = {len(sample.tokens) for group in groups for sample in group}
        if given != {tokens}:
            raise EngineError(
                f"{self.name} gave responses of {sorted(given)} tokens where each should have "
                f"{tokens}: its tokens a second cannot be compared"
            )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
