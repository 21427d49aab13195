"""What the rollout engine's process does for each request: generate, update, measure, sleep.

Requests to the model are *in flight* from ``submit`` until they have ended; ``step`` moves all of
them on by one token. An update may land while some are in flight:

    start   and stages: the bytes are copied; requests are stepped on
    update  a manifest: nothing is stepped from here on; apply and prove, once or twice; in between
            the KV scales may be measured (observe_kv)
    finish  drop the KV cache, that of requests in flight too, then commit, then label

Their cache holds keys and values of the old weights in the old scales. vLLM puts such requests back
into its queue (``reset_running_requests``) and computes prompt and answer so far anew, so they go
on exactly as from scratch; every token carries the version that sampled it. After an update that
failed the engine goes on with the version before it, requests in flight too, if every worker has
proven that it holds that; else these are aborted, and nothing is served until a good update lands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fp8rl.engine.observe import EngineObserver
from fp8rl.engine.replies import call_receiver, inputs, list_tensors, report, sample
from fp8rl.errors import StaleWeightsError
from fp8rl.sync.errors import UpdateRefusedError
from fp8rl.sync.plugin import BACKEND

SLEEP_TAGS = ("weights", "kv_cache")  # what vLLM can wake one by one
PROBLEMS_SHOWN = 5


@dataclass
class Ticket:
    """Requests submitted together: their ids in order, what became of them, or why nothing did."""

    requests: list[str]
    outputs: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


class EngineServer:
    """Answers the trainer's requests on one vLLM ``LLM``; public methods are requests, but for
    ``busy``, ``runs``, ``step`` and ``description``, which are for the loop around them.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        ours = {
            "load_format": "dummy",  # the weights come from the trainer, before anything is served
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "weight_transfer_config": {"backend": BACKEND},
            "enable_sleep_mode": current_platform.is_sleep_mode_available(),
        }
        self._llm = LLM(**(ours | arguments))
        self._observer = EngineObserver(self._llm, self._receivers)
        self._tickets: dict[int, Ticket] = {}
        self._in_flight: dict[str, int] = {}  # request id -> its ticket
        self._submitted = 0
        self._in_session = False  # vLLM's, from start to finish
        self._updating = False  # from the first manifest to the end of the session
        self._publisher = ""
        self._asleep: set[str] = set()

    def description(self) -> dict[str, Any]:
        """What the engine is: the tensors that each worker takes, and its KV cache in tokens."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return {
            "tensors": self._llm.collective_rpc(list_tensors),
            "kv_cache_tokens": cache.kv_cache_size_tokens,
        }

    @property
    def busy(self) -> bool:
        """Whether requests are in flight that may be stepped."""
        return bool(self._in_flight) and not self._updating

    def runs(self, ticket: int) -> bool:
        """Whether steps bring that ticket nearer to its end."""
        return self.busy and ticket in self._in_flight.values()

    def step(self) -> None:
        """Move every request in flight on; keep the outputs of those that have ended."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                ticket = self._in_flight.pop(output.request_id)
                self._tickets[ticket].outputs[output.request_id] = output

    def worker_report(self) -> list[dict[str, Any]]:
        """For each worker: the live weight-transfer backend, its version and why it refuses."""
        reports: list[dict[str, Any]] = self._llm.collective_rpc(report)
        return reports

    def kv_state(self) -> list[dict[str, Any]]:
        """For each worker: the KV scales that its attention layers hold, read live."""
        return self._receivers("kv_state")

    def submit(
        self,
        prompts: list[list[int]],
        version: int,
        sampling: dict[str, Any],
        seeds: list[int],
        max_tokens: list[int] | None = None,
    ) -> int:
        """Begin to sample completions under weights not older than ``version``.

        ``max_tokens``, if given, bounds each prompt's completions in place of ``sampling``'s.

        Returns the ticket for which ``collect`` gives them.

        Raises:
            StaleWeightsError: no proven weights of that version or a newer one are loaded.
            ValueError: a token that the model does not have, or vLLM refuses a request; none of
                them is in flight then.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        self._refuse_if_stale(version)
        own = max_tokens or [sampling["max_tokens"]] * len(prompts)
        parameters = [
            SamplingParams(
                logprobs=0, detokenize=False, **(sampling | {"seed": seed, "max_tokens": bound})
            )
            for seed, bound in zip(seeds, own, strict=True)
        ]
        requests = inputs(self._llm, prompts)
        try:
            added = self._llm.enqueue(requests, parameters, use_tqdm=False)
        except VLLMClientError as error:  # vLLM takes those before it back
            raise ValueError(f"vLLM refused a request: {error}") from error
        names = [name.partition("-")[0] for name in added]  # the rest is vLLM's own
        self._submitted += 1
        self._tickets[self._submitted] = Ticket(names)
        self._in_flight |= dict.fromkeys(names, self._submitted)
        return self._submitted

    def collect(self, ticket: int) -> list[list[dict[str, Any]]]:
        """For each prompt and sample: tokens, behaviour log-probs and the version of each token.

        Raises:
            StaleWeightsError: an update failed while they were in flight, which were aborted; or
                one is under way, and the ticket can be collected when it is finished.
            ValueError: no such ticket.
        """
        if ticket not in self._tickets:
            raise ValueError(f"ticket {ticket} was never given, or has been collected")
        if ticket in self._in_flight.values():
            raise StaleWeightsError(
                f"ticket {ticket} is held by an update under way; finish it, then collect"
            )
        ended = self._tickets.pop(ticket)
        if ended.failure is not None:
            raise StaleWeightsError(ended.failure)
        outputs = [ended.outputs[request] for request in ended.requests]
        return [[sample(completion) for completion in output.outputs] for output in outputs]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Introduce a publisher to every worker; what another one left unfinished is undone."""
        self._publisher = str(init_info.get("publisher"))
        with self._all_or_nothing():
            self._llm.init_weight_transfer_engine({"init_info": init_info})
            if self._in_session:
                self._end_session("another publisher took over")

    def start_weight_update(self) -> None:
        """Begin an update; what is held is served until a manifest comes."""
        if "weights" in self._asleep:
            raise RuntimeError("the engine's weights sleep; wake_up before an update")
        if self._in_session:  # the trainer gave the last one up
            self._end_session("a new update begins")
        with self._all_or_nothing():
            self._llm.start_weight_update()
            self._in_session = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """In every worker take in a stage, or apply and prove a manifest, or give the update up."""
        if "abandon" in update_info:
            if self._in_session:
                self._end_session(update_info["abandon"])
            self._fail_in_flight_unless_held(update_info["abandon"])
            return
        self._updating = self._updating or "manifest" in update_info
        with self._all_or_nothing():
            self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Drop the KV cache of the old weights, commit the new ones and label them."""
        with self._all_or_nothing():
            for worker in self.worker_report():
                if worker["unready"] is not None:
                    raise UpdateRefusedError(worker["unready"])
            self._drop_cache()
            self._llm.finish_weight_update(weight_version)
        self._updating = self._in_session = False

    def observe_kv(self, prompts: list[list[int]], histogram: bool) -> dict[str, Any]:
        """Run prompts through the weights just applied; what their q, k and v were, as JSON values.

        The forward reads its own FP8 cache, under the scales of the last version. Where these
        clipped something, the layers behind saw what was left, so it is run once more under scales
        that do not.

        Raises:
            RuntimeError: no update is under way; the KV cache sleeps; or requests are in flight,
                which vLLM's scheduler would run beside the prompts. In the last case the update
                fails.
        """
        if not self._updating:
            raise RuntimeError("observe_kv is for an update under way, after its weights")
        if self._asleep:
            raise RuntimeError("the KV cache sleeps; wake_up before its scales are measured")
        with self._all_or_nothing():
            self._refuse_in_flight("measures KV scales")
            seen = self._observer.kv(prompts, histogram)
            if any(self._receivers("hold_scales_for", seen)):
                seen = self._observer.kv(prompts, histogram)
        return seen

    def observe_routes(self, prompts: list[list[int]], version: int) -> list[Any]:
        """Run prompts through the engine; the experts of each prompt, token and layer.

        Raises:
            StaleWeightsError: no proven weights of that version or a newer one are loaded.
            RuntimeError: requests are in flight, which would run beside the prompts.
        """
        self._refuse_if_stale(version)
        self._refuse_in_flight("shows what its routers choose")
        return self._observer.routes(prompts)

    def observe_streams(
        self, prompts: list[list[int]], version: int, routes: bool
    ) -> dict[str, Any]:
        """Run prompts through the engine; a ``StreamObservation`` of them, as JSON values.

        With ``routes`` the experts are told too.

        Raises:
            StaleWeightsError, RuntimeError: as ``observe_routes``.
        """
        self._refuse_if_stale(version)
        self._refuse_in_flight("shows its residual stream")
        return self._observer.streams(prompts, routes)

    def sleep(self, level: int) -> None:
        """Give memory back: 1 keeps the weights in host memory, 2 discards them.

        Raises:
            ValueError: another level. RuntimeError: requests or an update are under way, or it
                sleeps already.
        """
        if level not in (1, 2):
            raise ValueError(f"sleep level {level}: expected 1 (keep weights) or 2 (discard them)")
        self._refuse_in_flight("sleeps")
        if self._in_session:
            raise RuntimeError("an update is under way; finish it before the engine sleeps")
        if self._asleep:
            raise RuntimeError(f"the engine sleeps already ({sorted(self._asleep)}); wake_up first")
        self._receivers("slept", level)
        self._llm.sleep(level)
        self._asleep = set(SLEEP_TAGS)

    def wake_up(self, tags: Sequence[str] | None) -> None:
        """Take memory again, that of ``tags`` or all; once all is back the scales are written anew.

        Raises:
            ValueError: a tag that does not sleep. RuntimeError: an update is under way, whose
                scales would be lost.
        """
        if self._in_session:
            raise RuntimeError("an update is under way; finish it before the engine wakes up")
        woken = self._asleep if tags is None else set(tags)
        if not woken <= self._asleep:
            raise ValueError(f"wake_up of {sorted(woken)}, but asleep are {sorted(self._asleep)}")
        if not woken:
            return
        self._llm.wake_up(sorted(woken))
        self._asleep -= woken
        if not self._asleep:
            self._receivers("woke")

    def forget(self) -> None:
        """Serve nothing more before another run has published its first version, whichever it is.

        Raises:
            RuntimeError: requests or an update are under way.
        """
        self._refuse_in_flight("is given to another run")
        if self._in_session:
            raise RuntimeError("an update is under way; finish it before another run begins")
        self._receivers("forget")
        self._drop_cache()

    def _refuse_if_stale(self, version: int) -> None:
        if self._asleep:
            raise StaleWeightsError(f"the engine sleeps ({sorted(self._asleep)}); wake_up first")
        for worker in self.worker_report():
            if worker["failure"] is not None:
                raise StaleWeightsError(
                    f"the engine serves nothing until a good update lands: {worker['failure']}"
                )
            if worker["version"] < version:
                why = f" (its last update failed: {worker['error']})" if worker["error"] else ""
                raise StaleWeightsError(
                    f"weights of version {version} were asked for, the engine holds "
                    f"{worker['version']}{why}; publish version {version} first"
                )
        problems = [problem for worker in self._receivers("scale_problems") for problem in worker]
        if problems:
            raise StaleWeightsError(
                f"{len(problems)} KV scale(s) are not those that were published, as after a reload "
                f"of the model; publish again: {'; '.join(problems[:PROBLEMS_SHOWN])}"
            )

    def _refuse_in_flight(self, what: str) -> None:
        if self._in_flight:
            tickets = sorted(set(self._in_flight.values()))
            raise RuntimeError(
                f"ticket(s) {tickets} are in flight; collect them before the engine {what}"
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What goes wrong inside, or what a worker refused, fails the update in every worker.

        Requests in flight go on where the version before it is held and proven; else they fail.
        """
        try:
            yield
            for worker in self.worker_report():
                if worker["refusal"] is not None:
                    raise UpdateRefusedError(worker["refusal"])
        except (ValueError, RuntimeError) as error:
            if self._in_session:
                self._end_session(f"{type(error).__name__}: {error}")
            self._fail_in_flight_unless_held(str(error))
            raise

    def _fail_in_flight_unless_held(self, reason: str) -> None:
        if all(worker["failure"] is None for worker in self.worker_report()):
            return
        self._llm.llm_engine.abort_request(list(self._in_flight))
        for ticket in self._in_flight.values():
            self._tickets[ticket].failure = (
                f"ticket {ticket} was in flight when an update failed, so it was aborted; "
                f"publish and submit again: {reason}"
            )
        self._in_flight.clear()

    def _end_session(self, reason: str) -> None:
        """Have every worker undo what it applied, and end vLLM's session."""
        self._in_session = self._updating = False
        info = {"publisher": self._publisher, "abandon": reason}
        self._llm.update_weights({"update_info": info})
        self._llm.finish_weight_update()

    def _drop_cache(self) -> None:
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM could not reset its prefix cache")

    def _receivers(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of the receiver in every worker."""
        results: list[Any] = self._llm.collective_rpc(call_receiver, args=(method, *arguments))
        return results
