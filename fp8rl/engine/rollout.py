"""The rollout engine as the trainer sees it: a vLLM process that answers for its weights.

``RolloutEngine`` starts the process and speaks to it through an ``EngineChannel``; it is the client
through which a ``Publisher`` updates it. Generation names the weight version it wants; an engine
that holds none as new, or cannot prove what it holds, refuses. ``submit`` and ``collect`` are the
two halves of ``generate``: between them the engine works on, and may be updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int64
from torch import Tensor

from fp8rl.engine.channel import ENGINE_PROCESS, EngineChannel
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError
from fp8rl.quant import EngineTensor
from fp8rl.quant.kv_observation import KVObservation
from fp8rl.sync.manifest import DTYPES, DtypeName
from fp8rl.sync.streams import StreamObservation

DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class Sample:
    """One response: token ids, log-probs under the policy that sampled, version of each token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A sequence to go on with, by ``max_tokens`` tokens at most; its ``seed`` is its own."""

    tokens: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How to sample: ``temperature`` 0 is greedy; ``samples`` responses a prompt."""

    max_tokens: int
    stop_token: int
    samples: int = 1
    temperature: float = 1.0

    def parameters(self) -> dict[str, Any]:
        """As keyword arguments of ``vllm.SamplingParams``."""
        return {
            "n": self.samples,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop_token_ids": [self.stop_token],
        }


class RolloutEngine:
    """A vLLM process; also the client that a ``Publisher`` updates. Close it, or use ``with``."""

    def __init__(
        self, settings: EngineSettings, folder: Path, *, module: str = ENGINE_PROCESS
    ) -> None:
        """Start the process and return at once; the first request waits until it is up.

        Args:
            settings: what to start.
            folder: gets ``engine.log`` (appended) and ``engine/config.json``.
            module: what the process runs, for an engine that answers more requests than ours.
        """
        self.settings = settings
        self.log_path = folder / "engine.log"
        arguments = settings.llm_arguments(folder / "engine")
        self._channel = EngineChannel(arguments, self.log_path, module)
        self._ready = False
        self._kv_cache_tokens = 0
        self._unplanned: list[str] = []  # where the engine is not what the plan says

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._channel.pid

    def close(self) -> None:
        """Kill the process, which holds nothing worth saving; calling it again does nothing."""
        self._channel.close()

    def worker_report(self) -> list[dict[str, Any]]:
        """For each worker: its live weight-transfer backend, version, failure and last timings."""
        report: list[dict[str, Any]] = self._call("worker_report")
        return report

    def generate(
        self, prompts: Sequence[Sequence[int]], *, version: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Sample responses under weights not older than ``version``.

        Args:
            prompts: token ids of each prompt.
            version: the oldest weight version that may answer.
            sampling: how, and how many for each prompt.
            seed: the same seed, prompts and weights give the same samples.

        Returns:
            For each prompt its samples, ``sampling.samples`` of them.

        Raises:
            StaleWeightsError: the engine's weights are older, or not proven to be of one version.
            EngineError: vLLM refused the request. EngineDiedError: the process ended.
        """
        ticket = self.submit(prompts, version=version, sampling=sampling, seed=seed)
        return self.collect(ticket)

    def extend(
        self, segments: Sequence[Segment], *, version: int, stop_token: int, temperature: float
    ) -> list[Sample]:
        """Go on with sequences, each for itself, under weights not older than ``version``.

        Args:
            segments: what stands there, tokens to come at most, and the seed of these.
            version: the oldest weight version that may answer.
            stop_token: ends a sequence, and is part of it.
            temperature: of sampling.

        Returns:
            For each segment its new tokens. A sequence is read from its start by the weights that
            answer, so that a segment is sampled as by an engine that has had no other weights.

        Raises:
            As ``generate``.
        """
        longest = max(segment.max_tokens for segment in segments)
        sampling = Sampling(max_tokens=longest, stop_token=stop_token, temperature=temperature)
        ticket: int = self._call(
            "submit",
            prompts=[list(segment.tokens) for segment in segments],
            version=version,
            sampling=sampling.parameters(),
            seeds=[segment.seed for segment in segments],
            max_tokens=[segment.max_tokens for segment in segments],
        )
        return [sample for [sample] in self.collect(ticket)]

    def submit(
        self, prompts: Sequence[Sequence[int]], *, version: int, sampling: Sampling, seed: int
    ) -> int:
        """Begin to sample, as ``generate`` does; returns at once with a ticket for ``collect``.

        Until it is collected the engine samples whenever no request keeps it from that. An update
        that lands meanwhile goes for the tokens still to come, with all keys and values computed
        anew; each token carries its version.

        Raises:
            As ``generate``.
        """
        seeds = [seed + index * sampling.samples for index in range(len(prompts))]
        ticket: int = self._call(
            "submit",
            prompts=[list(prompt) for prompt in prompts],
            version=version,
            sampling=sampling.parameters(),
            seeds=seeds,
        )
        return ticket

    def collect(self, ticket: int) -> list[list[Sample]]:
        """Wait for a ticket's samples, in any order of tickets; each can be collected once.

        Raises:
            StaleWeightsError: an update failed while they were in flight, so they were aborted; or
                one is under way: collect when it is finished.
            EngineError: no such ticket. EngineDiedError: the process ended.
        """
        groups = self._call("collect", ticket=ticket)
        return [[Sample(**{k: tuple(v) for k, v in s.items()}) for s in group] for group in groups]

    def observe_kv(self, prompts: Sequence[Sequence[int]], *, histogram: bool) -> KVObservation:
        """Run prompts through the live engine, mid-update, and say what q, k and v were.

        Args:
            prompts: token ids of each prompt; every one of them is observed.
            histogram: also count elements by magnitude, for percentiles.

        Raises:
            EngineError: no update is under way whose weights were applied, or requests are in
                flight (collect them first); an update that was under way has then failed.
        """
        seen = self._call(
            "observe_kv", prompts=[list(prompt) for prompt in prompts], histogram=histogram
        )
        return KVObservation.from_json(seen)

    def observe_routes(
        self, prompts: Sequence[Sequence[int]], *, version: int
    ) -> list[Int64[Tensor, "time layers k"]]:
        """Run prompts through an engine with experts, and say to which of them tokens go.

        Args:
            prompts: token ids of each prompt, computed whole in one forward.
            version: the oldest weight version that may answer.

        Returns:
            For each prompt the numbers of the experts, the first choice of a token first.

        Raises:
            StaleWeightsError: the engine's weights are older, or not proven to be of one version.
            EngineError: requests are in flight (collect them first), the model has no experts, or
                its routers do not show what they choose.
        """
        given = [list(prompt) for prompt in prompts]
        routes = self._call("observe_routes", prompts=given, version=version)
        return [torch.tensor(chosen, dtype=torch.int64) for chosen in routes]

    def observe_streams(
        self, prompts: Sequence[Sequence[int]], *, version: int, routes: bool
    ) -> StreamObservation:
        """Run prompts through the engine, and say what its layers make of them.

        Args:
            prompts: token ids of each prompt, computed whole in one forward.
            version: the oldest weight version that may answer.
            routes: of a model with experts, also say to which of them tokens go.

        Raises:
            As ``observe_routes``; EngineError too where its layers do not show the stream.
        """
        given = [list(prompt) for prompt in prompts]
        seen = self._call("observe_streams", prompts=given, version=version, routes=routes)
        return StreamObservation.from_json(seen)

    def kv_state(self) -> list[dict[str, dict[str, list[float]]]]:
        """For each worker the KV scales it holds, read live: layer -> q, k or v -> its copies.

        Copies are those on the device and its float mirror; for k and v also the one on the CPU.
        """
        state: list[dict[str, dict[str, list[float]]]] = self._call("kv_state")
        return state

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the KV cache holds at most, as vLLM reports it."""
        self.wait_ready()
        return self._kv_cache_tokens

    def sleep(self, level: int = 1) -> None:
        """Give the engine's device memory back until ``wake_up``; a CPU engine only pauses.

        Args:
            level: 1 keeps the weights in host memory; 2 discards them, so that after waking
                nothing is served before a publish.

        Raises:
            EngineError: requests are in flight (collect them first), or an update is under way.
        """
        self._call("sleep", level=level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Wake ``"weights"``, ``"kv_cache"`` or, without tags, all that sleeps.

        Raises:
            EngineError: a tag does not sleep, or the KV scales could not be restored.
        """
        self._call("wake_up", tags=None if tags is None else list(tags))

    def forget(self) -> None:
        """Begin another run: what is held is served no more, and its first version may be any.

        Raises:
            EngineError: requests are in flight (collect them first), or an update is under way.
        """
        self._call("forget")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Introduce a publisher and its transport to the engine."""
        self._call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Begin an update; the engine serves on until a manifest comes."""
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take in a stage, or apply and prove; raises EngineError with what was found wrong."""
        self._call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit the update under its version."""
        self._call("finish_weight_update", weight_version=weight_version)

    def wait_ready(self) -> None:
        """Block until the engine is up and audited against the plan.

        Raises:
            EngineDiedError: it does not start. EngineError: its model is not what the plan says.
        """
        if not self._ready:
            description = self._channel.receive()
            self._unplanned = self._audit(description["tensors"])
            self._kv_cache_tokens = description["kv_cache_tokens"]
            self._ready = True
            if self.settings.activations is not None:
                self._unplanned += self._other_kernels(self.worker_report())
        if self._unplanned:
            shown = "; ".join(self._unplanned[:DIFFERENCES_SHOWN])
            raise EngineError(
                f"the engine's model differs from the quantization plan in {len(self._unplanned)} "
                f"tensor(s), so nothing is sent to it: {shown}"
            )

    def _audit(self, workers: list[list[tuple[str, DtypeName, list[int]]]]) -> list[str]:
        """Every difference between the plan and the tensors that each worker reports."""
        plan, problems = self.settings.plan(), []
        for tensors in workers:
            found = [EngineTensor(n, DTYPES[dtype], tuple(shape)) for n, dtype, shape in tensors]
            problems += [str(difference) for difference in plan.audit(found)]
        return problems

    def _other_kernels(self, workers: list[dict[str, Any]]) -> list[str]:
        """Every FP8 layer whose kernel takes its input otherwise than the settings say."""
        wanted = self.settings.activations
        return [
            f"worker {rank}: {layer} takes its input in {found}, and activations is {wanted}"
            for rank, worker in enumerate(workers)
            for layer, found in worker["activations"].items()
            if found != wanted
        ]

    def _call(self, method: str, **params: Any) -> Any:
        self.wait_ready()
        return self._channel.call(method, params)
