"""The engine's side of `fp8rl bench rollout`: our engine process, which also tells its times.

    python -m fp8rl.bench.rollout_engine FD PID

Times are vLLM's own, of each request (``RequestOutput.metrics``), which vLLM takes where its
statistics are on:

    time to first token     from the request's arrival to its first token, waiting included
    time per output token   from the first to the last, divided by the tokens in between
"""

from __future__ import annotations

from typing import Any

import torch

from fp8rl.engine.process import main
from fp8rl.engine.server import EngineServer


class RolloutServer(EngineServer):
    """Answers the bench's requests too; times are seconds."""

    def collect(self, ticket: int) -> list[list[dict[str, Any]]]:
        """As ours, and remember the times of its requests."""
        ended = self._tickets.get(ticket)
        groups = super().collect(ticket)
        assert ended is not None  # or collect would have refused
        self._metrics = [ended.outputs[request].metrics for request in ended.requests]
        return groups

    def timings(self) -> dict[str, Any]:
        """Of the requests that were collected last: times to and per token, and preemptions."""
        found = self._metrics
        return {
            "first": [m.first_token_latency for m in found],
            "each": [
                (m.last_token_ts - m.first_token_ts) / (m.num_generation_tokens - 1)
                for m in found
                if m.num_generation_tokens > 1
            ],
            "preemptions": sum(m.num_preemptions for m in found),
        }

    def memory(self) -> dict[str, int]:
        """Bytes and tokens of the KV cache, and bytes in use on the GPU (0 on a CPU)."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        [block_bytes] = self._llm.collective_rpc(_block_bytes)
        device = 0
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            device = total - free
        return {
            "kv_bytes": cache.num_gpu_blocks * block_bytes,
            "kv_tokens": cache.kv_cache_size_tokens,
            "device_bytes": device,
        }


def _block_bytes(worker: Any) -> int:
    """Run inside the one worker: bytes of a block of the KV cache, all layers."""
    return sum(spec.page_size_bytes for spec in worker.get_kv_cache_spec().values())


if __name__ == "__main__":
    main(RolloutServer)
