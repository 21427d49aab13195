"""Lanes side by side, from the study's end: processes, their cores, their replies, their ends."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from fp8rl.lifeline import end_with_parent

MODULE = "fp8rl.stability.lane"
SAVE_SECONDS = 120.0  # for a run to end its step after Ctrl-C
T = TypeVar("T")


class Lane(Generic[T]):
    """A lane's process, on cores of its own; ``job`` is what it does now, None while it idles."""

    def __init__(self, cores: list[int], log: Path) -> None:
        self._cores, self._log = cores, log
        self.job: T | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # the cores given say how many threads there are: neither torch nor vLLM is told otherwise
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the study, which passes it on
                preexec_fn=partial(_prepare, os.getpid(), self._cores),
            )
        self.socket, self._buffer = ours, b""

    def send(self, job: T, message: Mapping[str, Any]) -> None:
        """Begin a job. A lane that has died since is told of by ``receive``."""
        self.job = job
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return

    def receive(self) -> dict[str, Any] | None:
        """Take what came: the reply, None while it is not whole, ``{"end": "died"}`` at the end.

        A lane that died is started anew.
        """
        try:
            chunk = self.socket.recv(1 << 20)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self.socket.close()
            code = self._process.wait()
            self._start()
            return {"end": "died", "code": code}
        self._buffer += chunk
        if b"\n" not in self._buffer:
            return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def interrupt(self) -> None:
        """Ask the run to stop after its step; a lane that idles ends."""
        if self.job is None:
            self.socket.shutdown(socket.SHUT_RDWR)
        else:
            self._process.send_signal(signal.SIGINT)

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Kill the process, with its engine."""
        self._process.kill()
        self._process.wait()
        self.socket.close()


class Lanes(Generic[T]):
    """Several lanes; a context manager that leaves no process behind.

    Where the block ends by Ctrl-C, runs are saved after their step; a second Ctrl-C kills.
    """

    def __init__(self, count: int, used: int, folder: Path) -> None:
        """Divide the cores by ``count``, and start ``used`` lanes.

        What a run computes depends in its last bits on its threads, so that fewer runs get no more.
        """
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[n::count] or [cores[n % len(cores)]] for n in range(used)]
        self.lanes = [Lane[T](part, folder / f"lane-{n}.log") for n, part in enumerate(shares)]

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the lanes."""
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                for lane in self.lanes:
                    lane.interrupt()
                deadline = time.monotonic() + SAVE_SECONDS
                while time.monotonic() < deadline and not all(x.ended() for x in self.lanes):
                    time.sleep(0.05)
        finally:
            for lane in self.lanes:
                lane.close()

    def wait(self, seconds: float) -> Iterator[tuple[Lane[T], dict[str, Any]]]:
        """The lanes that replied within ``seconds``, or died, and what they said."""
        with selectors.DefaultSelector() as selector:
            for lane in self.lanes:
                if lane.job is not None:
                    selector.register(lane.socket, selectors.EVENT_READ, lane)
            for key, _ in selector.select(seconds):
                reply = key.data.receive()
                if reply is not None:
                    yield key.data, reply


def _prepare(parent: int, cores: list[int]) -> None:
    """In the child, before it runs."""
    end_with_parent(parent, signal.SIGKILL)
    os.sched_setaffinity(0, cores)
