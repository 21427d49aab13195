"""The engine's side of the ways that `fp8rl bench sync` holds ours against.

    python -m fp8rl.bench.sync_engine FD PID

Our engine process with a few requests more, none of which proves anything:

    BF16 and quantized here    BF16 comes through shared memory, a stage at a time; what the engine
                               holds in FP8 is cast at once by vLLM's helper for whole blocks, in
                               power-of-two scales; all is loaded at the end. As veRL does, whose
                               receiver quantizes each bucket that comes.
    memcpy and load            FP8 bytes are copied out of shared memory into a buffer that is kept,
                               and loaded: the least that any way can take
    BF16, reloaded from disk   vLLM's own reload_weights

Loading is vLLM's layerwise reload (``sync/engine_load.py``), the same as in ours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp8rl.bench import memory
from fp8rl.bench.quant_ways import vllm_cast
from fp8rl.bench.sync_bytes import Bucket, Layout, timed_fingerprints, views
from fp8rl.engine.process import main
from fp8rl.engine.server import EngineServer
from fp8rl.sync.engine_state import differences, expected_tensors, load
from fp8rl.sync.segment import Segment


class SyncServer(EngineServer):
    """Answers the bench's requests too; times are seconds."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        [(self._model, self._config)] = self._llm.collective_rpc(_parts)

    def description(self) -> dict[str, Any]:
        """As ours, and no tensors where the engine is none of ours (it quantizes by itself)."""
        if self._llm.llm_engine.vllm_config.weight_transfer_config is None:
            return {"tensors": [], "kv_cache_tokens": 0}
        return super().description()

    def give_back(self) -> None:
        """Have the C library give back what it keeps."""
        memory.give_back()

    def open_bf16(self, path: str, nbytes: int, shapes: Mapping[str, Sequence[int]]) -> None:
        """Attach the ring through which tensors of these shapes will come, in order."""
        self._ring = Segment.attach(path, nbytes)
        expected = {tensor.name for tensor in expected_tensors(self._model)}
        quantized = {name for name in shapes if f"{name}_scale_inv" in expected}
        self._bucket = Bucket(shapes, quantized, vllm_cast)

    def take_bf16(self, stage: Mapping[str, int]) -> None:
        """Take in one stage."""
        if stage["start"] == 0:
            self._bucket.clear()
        self._bucket.take(self._ring.view(stage["at"], stage["nbytes"]))

    def load_bf16(self) -> dict[str, float]:
        """Load what came; tells what casting took, and loading."""
        seconds = {"quantize": self._bucket.seconds, "load": self._load(self._bucket.tensors)}
        self._bucket.clear()
        return seconds

    def open_floor(self, path: str, nbytes: int, layout: Layout) -> None:
        """Attach the segment in which the FP8 bytes lie, and take memory of our own for them."""
        self._segment = Segment.attach(path, nbytes)
        self._held = torch.zeros(nbytes, dtype=torch.uint8)
        self._tensors = views(self._held, layout)

    def copy_and_load(self) -> dict[str, float]:
        """Copy the bytes and load them; tells what either took."""
        began = time.perf_counter()
        self._held.copy_(self._segment.bytes)
        copied = time.perf_counter() - began
        return {"copy": copied, "load": self._load(self._tensors)}

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprint what was copied; tells the digests, and what they took."""
        return timed_fingerprints(self._tensors)

    def differences(self) -> list[str]:
        """What the model holds that is not what was copied."""
        return differences(self._model, self._tensors)

    def reload(self, path: str) -> None:
        """Have vLLM reload a checkpoint from disk."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})

    def _load(self, tensors: Mapping[str, Tensor]) -> float:
        began = time.perf_counter()
        load(self._model, self._config, tensors)
        return time.perf_counter() - began


def _parts(worker: Any) -> tuple[Any, Any]:
    """Run inside the one worker: its model, and the model's config."""
    return worker.get_model(), worker.model_config


if __name__ == "__main__":
    main(SyncServer)
