"""The rollout engine's own process: the real vLLM behind one socket.

The trainer starts ``python -m fp8rl.engine_process FD PID`` and talks JSON lines over an inherited
socket: one request, one reply, in order. The first line carries the ``LLM`` arguments. Update calls
go straight to vLLM's weight-transfer API; generation is refused while no proven weights of the
version asked for are there. The process ends when the socket closes or its parent dies. Errors that
no request can cause end it too, loudly: its log says why and the trainer is told at once.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from fp8rl.errors import StaleWeightsError
from fp8rl.lifeline import end_with_parent
from fp8rl.sync.manifest import DTYPE_NAMES
from fp8rl.sync.plugin import BACKEND


class EngineServer:
    """Answers the trainer's requests on one vLLM ``LLM``; every public method is a request."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(
            load_format="dummy",  # the weights come from the trainer, before anything is served
            skip_tokenizer_init=True,
            logprobs_mode="processed_logprobs",  # those of the distribution that was sampled from
            weight_transfer_config={"backend": BACKEND},
            **arguments,
        )
        self._stale_cache = False

    def worker_report(self) -> list[dict[str, Any]]:
        """For each worker: the live weight-transfer backend, its version and why it refuses."""
        reports: list[dict[str, Any]] = self._llm.collective_rpc(_describe_receiver)
        return reports

    def engine_tensors(self) -> list[list[Any]]:
        """For each worker: name, dtype and shape of every tensor that its model takes."""
        tensors: list[list[Any]] = self._llm.collective_rpc(_list_tensors)
        return tensors

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell every worker where the trainer's segment lies."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update; nothing is served until it is finished."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Apply and prove one update in every worker."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Commit: drop the prefix cache of the old weights, then label the new ones."""
        self._stale_cache = True
        self._llm.finish_weight_update()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: requests are in flight")
        self._stale_cache = False
        self._llm.update_weight_version(weight_version)

    def generate(
        self, prompts: list[list[int]], version: int, sampling: dict[str, Any], seeds: list[int]
    ) -> list[list[dict[str, Any]]]:
        """Sample completions under weights not older than ``version``.

        Returns, for each prompt and sample, tokens, behaviour log-probs and the weight version of
        each token.

        Raises:
            StaleWeightsError: no proven weights of that version or a newer one are loaded.
        """
        from vllm import SamplingParams

        self._refuse_if_stale(version)
        parameters = [
            SamplingParams(seed=seed, logprobs=0, detokenize=False, **sampling) for seed in seeds
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_sample(completion) for completion in output.outputs] for output in outputs]

    def _refuse_if_stale(self, version: int) -> None:
        for worker in self.worker_report():
            if worker["failure"] is not None:
                raise StaleWeightsError(
                    f"the engine serves nothing until a good update lands: {worker['failure']}"
                )
            if worker["version"] < version:
                raise StaleWeightsError(
                    f"weights of version {version} were asked for, the engine holds "
                    f"{worker['version']}; publish version {version} first"
                )
        if self._stale_cache:
            raise StaleWeightsError("the prefix cache still holds keys and values of old weights")


def _describe_receiver(worker: Any) -> dict[str, Any]:
    """Run inside a worker: what its weight-transfer engine is and holds."""
    receiver = worker.weight_transfer_engine
    report = receiver.report
    return {
        "backend": type(receiver).__name__,
        "version": receiver.version,
        "failure": receiver.failure,
        "tensors_proven": report.tensors_proven if report else 0,
        "kv_scales_proven": report.kv_scales_proven if report else 0,
        "seconds": report.seconds if report else {},
    }


def _list_tensors(worker: Any) -> list[Any]:
    """Run inside a worker: what its own model takes, as JSON values."""
    expected = worker.weight_transfer_engine.expected.values()
    return [[t.name, DTYPE_NAMES[t.dtype], list(t.shape)] for t in expected]


def _sample(completion: Any) -> dict[str, Any]:
    """One vLLM completion as JSON values."""
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)
    ]
    versions = [0] * len(tokens)
    for span in completion.weight_versions:
        for position in range(span.start, span.end):
            versions[position] = int(span.version)
    return {"tokens": tokens, "logprobs": logprobs, "versions": versions}


def serve(connection: socket.socket) -> None:
    """Answer requests until the trainer closes its end."""
    lines = connection.makefile("r", encoding="utf-8")
    first = lines.readline()
    if not first:
        return
    server = EngineServer(json.loads(first))
    _reply(connection, {"ready": True, "tensors": server.engine_tensors()})
    for line in lines:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(server, request["method"])
        try:
            reply = {"result": method(**request["params"])}
        except (ValueError, RuntimeError) as error:  # what a request can cause; others end us
            reply = {"error": type(error).__name__, "message": str(error)}
        _reply(connection, reply)


def _reply(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


def main() -> None:
    """Serve on a socket; the arguments are its file descriptor and the trainer's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    end_with_parent(parent, signal.SIGKILL)
    serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    main()
