"""The trainer's end of the engine process: start it, send it requests, notice how it ends.

One JSON line a request, one a reply, over a socket that the process inherits. A process that dies
is noticed the moment its socket closes, and the error carries the last lines of its log.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fp8rl.errors import EngineDiedError, EngineError, StaleWeightsError

ENGINE_PROCESS = "fp8rl.engine.process"
LOG_LINES_SHOWN = 15
STOP_SECONDS = 10.0  # from a closed socket to the end of its process

# Of torchrun's variables none may reach vLLM, which would take them for its own rendezvous.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in our child, not a grandchild
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin on cores that the trainer needs
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; spares 15 s of compiling a log-prob rank counter
    # An update needs the same memory each time. Given back to the system in between, it would come
    # back a page fault at a time, which takes longer than what is done with it.
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


class EngineChannel:
    """A running engine process and the way to it."""

    def __init__(
        self, arguments: Mapping[str, Any], log_path: Path, module: str = ENGINE_PROCESS
    ) -> None:
        """Start the process with the arguments of ``vllm.LLM``; it logs to the end of ``log_path``.

        ``module`` is what runs in it. Returns at once; the first ``receive`` waits until the engine
        is up.
        """
        self._log_path = log_path
        ours, theirs = socket.socketpair()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
        threads = _threads(int(arguments["tensor_parallel_size"]))
        environment = {**inherited, **threads, **ENVIRONMENT}
        if not arguments.get("enforce_eager"):
            del environment["TORCHDYNAMO_DISABLE"]
        with theirs, log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which then stops us
            )
        self._socket = ours
        self._lines = ours.makefile("r", encoding="utf-8")
        self._send(arguments)

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def close(self) -> None:
        """Kill the process, which holds nothing worth saving; calling it again does nothing.

        A call that another thread waits in ends with EngineDiedError. It must have been woken
        before anything is closed under it: ``makefile``'s reader is locked while it reads.
        """
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # closed before, or by its other end
            self._socket.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._socket.close()

    def call(self, method: str, params: Mapping[str, Any]) -> Any:
        """Send a request and wait for its result.

        Raises:
            StaleWeightsError, EngineError: what the engine answered. EngineDiedError: it ended.
        """
        self._send({"method": method, "params": params})
        reply = self.receive()
        if "error" not in reply:
            return reply["result"]
        kind = StaleWeightsError if reply["error"] == "StaleWeightsError" else EngineError
        raise kind(f"{reply['error']}: {reply['message']}")

    def receive(self) -> dict[str, Any]:
        """Wait for the next line of the engine; raises EngineDiedError if none will come."""
        try:
            line = self._lines.readline()
        except OSError as error:
            raise self._died() from error
        if not line:
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._died() from error

    def _died(self) -> EngineDiedError:
        """The error for an engine whose socket closed: how it ended and its log's last lines."""
        try:
            code: int | str = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = "none: still running, its socket closed"
        lines = self._log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return EngineDiedError(
            f"the rollout engine (pid {self.pid}) ended, exit code {code}; the last lines of "
            f"{self._log_path}:\n  " + "\n  ".join(lines)
        )


def _threads(workers: int) -> dict[str, str]:
    """How the cores are shared: one engine process takes all, several workers a part each."""
    cores = sorted(os.sched_getaffinity(0))
    if workers == 1:
        return {"OMP_NUM_THREADS": str(len(cores))}
    parts = [cores[rank::workers] or cores[:1] for rank in range(workers)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts)}
