"""The ways that `fp8rl bench sync` compares, as the trainer drives them.

    ours, full               quantize, publish through shared memory, proven
    ours, delta              what differs from the version before, on an engine of its own
    BF16, quantized there    the same ring carries BF16, which the engine quantizes and loads
    memcpy and load          FP8 bytes, made before the clock starts, are copied and loaded
    BF16, reloaded from disk vLLM's reload_weights: reads a checkpoint, written before the clock
                             starts, and quantizes as it loads (vLLM's online ``fp8_per_block``)

The first two prove what the engine then holds, the others nothing. A turn is one way's update by
one version; where its time goes is told by phase, in seconds of the clock that is waited for:

    quantize     at the source, or in the engine where BF16 is sent
    encode       fingerprints and records; of a delta comparing and encoding too
    transport    filling the ring, and waiting until the engine has copied it
    verify       in the engine: decoding, fingerprints, no NaN
    load         vLLM's layerwise reload; of a checkpoint reading and quantizing too
    read back    what the kernels hold is compared
    commit       all else: messages, dropping the KV cache, exchanging the mirror
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from fp8rl.bench.sync_bytes import lay_out, timed_fingerprints, views
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError
from fp8rl.quant import FP32Source, QuantizedTensor, QuantPlan
from fp8rl.sync import IterableSource, Publisher
from fp8rl.sync.admission import as_bytes
from fp8rl.sync.segment import Segment
from fp8rl.sync.shm import ShmOutbox
from fp8rl.sync.source import TensorMeta, encoded
from fp8rl.sync.trainer_ranks import TrainerRanks
from fp8rl.sync.transport import Outbox
from fp8rl.sync.transports import SharedMemory

FULL, DELTA = "ours, full", "ours, delta"
THERE, FLOOR, DISK = "BF16, quantized there", "memcpy and load", "BF16, reloaded from disk"
QUANTIZE, ENCODE, TRANSPORT, COMMIT = "quantize", "encode", "transport", "commit"
VERIFY, LOAD, READ_BACK = "verify", "load", "read back"
PHASES = (QUANTIZE, ENCODE, TRANSPORT, VERIFY, LOAD, READ_BACK, COMMIT)
CODES, SCALES, BF16, MESSAGES = "FP8 codes", "scales", "BF16", "messages and padding"


@dataclass(frozen=True)
class Turn:
    """One update: seconds in all and by phase, and bytes that went to the engine by kind."""

    seconds: float
    phases: Mapping[str, float]
    wire: Mapping[str, int]

    @classmethod
    def of(cls, seconds: float, phases: Mapping[str, float], wire: Mapping[str, int]) -> Turn:
        """Make one; what no phase took is the commit's."""
        return cls(seconds, {**phases, COMMIT: seconds - sum(phases.values())}, wire)


class Engine(RolloutEngine):
    """An engine that answers the bench's requests, and remembers the messages of an update."""

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        """Start it; its log and checkpoint go into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(settings, folder, module="fp8rl.bench.sync_engine")
        self.messages: list[Mapping[str, Any]] = []

    def ask(self, request: str, **params: Any) -> Any:
        """Send a request of ``sync_engine.SyncServer``."""
        return self._call(request, **params)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As ours."""
        self.messages.append(update_info)
        super().update_weights(update_info)


class Way(Protocol):
    """One way to bring a version to its engine."""

    def turn(self, version: int) -> Turn:
        """Bring the weights as they are now."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Ours:
    """Our publisher, whole versions or deltas; deltas begin with a whole one."""

    def __init__(
        self, engine: Engine, plan: QuantPlan, weights: Mapping[str, Tensor], *, deltas: bool
    ) -> None:
        self._engine = engine
        self._source = _ClockedSource(weights)
        self._ring = Clock()
        ring = _ClockedRing(self._ring)
        self._publisher = Publisher(plan, engine, transport=ring, deltas=deltas)

    def turn(self, version: int) -> Turn:
        """Publish; returns when it is proven and committed."""
        self._engine.messages.clear()
        self._source.clock.seconds = self._ring.seconds = 0.0
        began = time.perf_counter()
        report = self._publisher.publish(self._source, version=version, kv_scales=None)
        ended = time.perf_counter()
        assert report is not None  # this rank has the engine
        [worker] = self._engine.worker_report()
        theirs = worker["seconds"]
        phases = {
            QUANTIZE: self._source.clock.seconds,
            TRANSPORT: self._ring.seconds,
            VERIFY: theirs["verify"],
            LOAD: theirs["load"],
            READ_BACK: theirs["read_back"],
        }
        phases[ENCODE] = report.quantize_seconds - phases[QUANTIZE] - phases[TRANSPORT]
        wire = wire_of(self._engine.messages, report.nbytes)
        return Turn.of(ended - began, phases, wire)

    def close(self) -> None:
        """Give the ring back."""
        self._publisher.close()


class There:
    """BF16 through a ring like ours, quantized by the engine."""

    def __init__(self, engine: Engine, weights: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._weights = weights
        self._nbytes = sum(tensor.nbytes for tensor in weights.values())
        self._outbox = ShmOutbox(self._nbytes, 1)
        [ring] = self._outbox.introductions()
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        engine.ask("open_bf16", path=ring["path"], nbytes=ring["nbytes"], shapes=shapes)

    def turn(self, version: int) -> Turn:
        """Send, quantize, load."""
        began = time.perf_counter()
        self._outbox.begin(self._nbytes, lambda content: self._engine.ask("take_bf16", **content))
        for tensor in self._weights.values():
            self._outbox.write(as_bytes(tensor))
        self._outbox.finish()
        sent = time.perf_counter() - began
        took = self._engine.ask("load_bf16")
        phases = {
            QUANTIZE: took["quantize"],
            TRANSPORT: sent - took["quantize"],
            LOAD: took["load"],
        }
        return Turn.of(time.perf_counter() - began, phases, {BF16: self._nbytes})

    def close(self) -> None:
        """Give the ring back."""
        self._outbox.close()


class Floor:
    """FP8 bytes that lie in shared memory, copied and loaded."""

    def __init__(self, engine: Engine, plan: QuantPlan, weights: Mapping[str, Tensor]) -> None:
        self._engine = engine
        self._plan, self._source = plan, IterableSource(weights)
        layout, nbytes = lay_out(plan.engine_tensors())
        self._segment = Segment.create(nbytes)
        self._tensors = views(self._segment.bytes, layout)
        engine.ask("open_floor", path=self._segment.path, nbytes=nbytes, layout=layout)
        self.fill()

    def fill(self) -> None:
        """Quantize the weights as they are now, before the clock starts."""
        for name, value in encoded(self._source, self._plan, to=[0]):
            if isinstance(value, QuantizedTensor):
                self._tensors[name].copy_(value.data)
                self._tensors[f"{name}_scale_inv"].copy_(value.scale_inv)
            else:
                self._tensors[name].copy_(value)

    def turn(self, version: int) -> Turn:
        """Copy and load."""
        began = time.perf_counter()
        took = self._engine.ask("copy_and_load")
        phases = {TRANSPORT: took["copy"], LOAD: took["load"]}
        return Turn.of(time.perf_counter() - began, phases, {"FP8": self._segment.nbytes})

    def fingerprints(self) -> tuple[float, float]:
        """Fingerprint all tensors here and in the engine; tells what either took.

        Raises EngineError where they differ.
        """
        here, there = timed_fingerprints(self._tensors), self._engine.ask("fingerprints")
        if here["digests"] != there["digests"]:
            raise EngineError("the bytes that the engine copied are not those sent")
        return here["seconds"], there["seconds"]

    def close(self) -> None:
        """Give the shared memory back."""
        self._tensors = {}
        self._segment.close()


class Disk:
    """vLLM's reload_weights, on an engine that quantizes by itself."""

    def __init__(self, engine: Engine, checkpoint: Path) -> None:
        self._engine, self._checkpoint = engine, checkpoint

    def turn(self, version: int) -> Turn:
        """Read, quantize, load. The file is that of the first version, in the page cache."""
        began = time.perf_counter()
        self._engine.ask("reload", path=str(self._checkpoint.parent))
        phases = {LOAD: time.perf_counter() - began}
        return Turn.of(time.perf_counter() - began, phases, {BF16: self._checkpoint.stat().st_size})

    def close(self) -> None:
        """Nothing is held."""


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write BF16 weights to where an engine that is started in ``folder`` looks for them."""
    path = folder / "engine" / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(dict(weights), path)
    return path


class Clock:
    """Adds up seconds."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


class _ClockedSource:
    """Our source, with a clock of what quantizing takes."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._source = IterableSource(weights)
        self.ranks = TrainerRanks(None)
        self.clock = Clock()

    def metadata(self) -> list[TensorMeta]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._source)

    def encoded(
        self, plan: QuantPlan, *, to: Sequence[int], fp32_as: FP32Source | None = None
    ) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
        stream = encoded(self._source, plan, to=to, fp32_as=fp32_as)
        while True:
            with self.clock.running():
                pair = next(stream, None)
            if pair is None:
                return
            yield pair


class _ClockedOutbox(ShmOutbox):
    """Our ring, with a clock of what writing takes, and waiting until all is copied."""

    def __init__(self, largest_payload: int, engines: int, clock: Clock) -> None:
        super().__init__(largest_payload, engines)
        self._clock = clock

    def write(self, data: Tensor) -> None:
        with self._clock.running():
            super().write(data)

    def finish(self) -> None:
        with self._clock.running():
            super().finish()


@dataclass(frozen=True)
class _ClockedRing(SharedMemory):
    """Our transport, with a clock."""

    clock: Clock

    def open(self, largest_payload: int, engines: int) -> Outbox:
        return _ClockedOutbox(largest_payload, engines, self.clock)


def wire_of(messages: Sequence[Mapping[str, Any]], payload_nbytes: int) -> dict[str, int]:
    """What an update sent, by kind, from its messages: parcels, and the messages themselves."""
    found = dict.fromkeys((CODES, SCALES, BF16), 0)
    kinds = {"float8_e4m3fn": CODES, "float32": SCALES, "bfloat16": BF16}
    for message in messages:
        for tensor in message.get("manifest", {}).get("tensors", []):
            if tensor["parcel"] is not None:
                found[kinds[tensor["dtype"]]] += tensor["parcel"]["nbytes"]
    said = sum(len(json.dumps(message)) for message in messages)
    return {**found, MESSAGES: payload_nbytes - sum(found.values()) + said}
