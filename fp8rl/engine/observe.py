"""Forwards of the live engine that are watched: its cache, its experts, its residual stream.

Every worker's model is watched (``sync/engine_watch.py``) while vLLM computes some prompts whole,
whatever of them is in the prefix cache; nothing else may be in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from fp8rl.engine.replies import inputs, prompt_logprobs
from fp8rl.quant.kv_observation import KVObservation


class EngineObserver:
    """Watches forwards of one ``LLM``; ``receivers`` calls a method of every worker's receiver."""

    def __init__(self, llm: Any, receivers: Callable[..., list[Any]]) -> None:
        self._llm, self._receivers = llm, receivers

    def kv(self, prompts: list[list[int]], histogram: bool) -> dict[str, Any]:
        """What q, k and v of the prompts are, in all layers and heads, as JSON values."""
        self._receivers("start_observation", True, histogram)
        try:
            self._forward(prompts)
        finally:
            seen = self._receivers("end_observation")
        parts = [KVObservation.from_json(part) for part in seen]  # each worker saw its heads
        return reduce(KVObservation.beside, parts).to_json()

    def routes(self, prompts: list[list[int]]) -> list[Any]:
        """The experts of each prompt, token and layer, the first choice of a token first."""
        self._receivers("start_routes")
        try:
            self._forward(prompts)
            routes = self._receivers("routes", prompts)
        finally:
            self._receivers("stop_watching")
        found: list[Any] = routes[0]  # every worker computes the whole of every router
        return found

    def streams(self, prompts: list[list[int]], routes: bool) -> dict[str, Any]:
        """A ``StreamObservation`` of prompts in JSON values; with ``routes`` the experts too."""
        self._receivers("start_streams", routes)
        try:
            outputs = self._forward(prompts, prompt_logprobs=0)
            stream = self._receivers("streams", prompts)[0]  # every worker has the whole of it
            chosen = self._receivers("routes", prompts)[0] if routes else None
        finally:
            self._receivers("stop_watching")
        return {
            "stream": stream,
            "logprobs": [lp for output in outputs for lp in prompt_logprobs(output)],
            "routes": chosen and [token for prompt in chosen for token in prompt[:-1]],
        }

    def _forward(self, prompts: list[list[int]], **asked: Any) -> list[Any]:
        from vllm import SamplingParams

        once = SamplingParams(
            max_tokens=1, detokenize=False, skip_reading_prefix_cache=True, **asked
        )
        added: list[str] = []
        try:
            added = self._llm.enqueue(inputs(self._llm, prompts), once, use_tqdm=False)
            outputs: list[Any] = self._llm.wait_for_completion(use_tqdm=False)
            return outputs
        finally:
            self._llm.llm_engine.abort_request(added, internal=True)  # where a step failed
