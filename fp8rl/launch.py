"""Start the trainer ranks on this machine, with Ctrl-C, their ends and the exit code in order.

``fp8rl train`` runs in one process where one rank is enough. For more it starts itself again, once
for each rank, with the environment that ``torch.distributed`` reads (and torchrun sets). Unlike
torchrun it lets rank 0 say why a run failed before it ends, and says nothing itself.

Each rank has a session of its own: the terminal signals only this process, which passes every
signal on to each rank once. If this process is killed, the ranks are. A rank that fails breaks the
collectives of the others, which end by themselves; those that do not are killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from fp8rl.lifeline import end_with_parent

FORWARDED = (signal.SIGINT, signal.SIGTERM)
LINGER_SECONDS = 60.0  # for the other ranks to notice that one has failed
POLL_SECONDS = 0.05


def launch(
    arguments: Sequence[str], ranks: int, *, program: Sequence[str] = ("-m", "fp8rl")
) -> int:
    """Run ``python program arguments`` once for each rank, and wait for all.

    Args:
        arguments: Command line of each rank, such as ``["train", "examples/grpo.yaml"]``.
        ranks: Number of processes.
        program: What python runs: ``-m module`` or a file.

    Returns:
        0 if every rank ended well, else the exit code of rank 0, or 1 where it has none.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in FORWARDED}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for environment in _environments(ranks):
            command = [sys.executable, *program, *arguments]
            bound = partial(end_with_parent, os.getpid(), signal.SIGKILL)
            processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=bound)
            )
        codes = _wait(processes, received)
    finally:
        for process in processes:
            process.kill()  # does nothing to those that have ended
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0 if not any(codes) else max(codes[0], 0) or 1


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: list[int]) -> list[int]:
    """Pass signals on until every rank has ended; returns their exit codes."""
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        while received:
            number = received.pop(0)
            for process in processes:
                process.send_signal(number)
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + LINGER_SECONDS:
            for process in processes:
                process.kill()
        time.sleep(POLL_SECONDS)
    return [process.wait() for process in processes]


def _environments(ranks: int) -> list[dict[str, str]]:
    """What tells each rank its number and where to meet the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    common = {"OMP_NUM_THREADS": str(threads)} | os.environ
    common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
