"""Start the trainer ranks: torchrun on one machine, with Ctrl-C and its exit code in order.

``fp8rl train`` runs in one process where one rank is enough. For more it starts itself again under
``torch.distributed.run``, once a rank. The terminal's Ctrl-C must reach each rank exactly once:
torchrun gets a session of its own, so the terminal signals only this process, which passes one
signal on to torchrun, which passes it on to the ranks and ends those that do not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM)
SAVE_SECONDS = 120  # for a rank to end its step and save before it is killed


def launch(
    arguments: Sequence[str], ranks: int, *, program: Sequence[str] = ("-m", "fp8rl")
) -> int:
    """Run ``python program arguments`` once for each rank, and wait for all.

    Args:
        arguments: Command line of each rank, such as ``["train", "examples/grpo.yaml"]``.
        ranks: Number of processes.
        program: What python runs: ``-m module`` or a file.

    Returns:
        0 if every rank ended well, 128 + the signal's number if one was received here (130 for
        Ctrl-C), else torchrun's exit code.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "--shutdown-timeout", str(SAVE_SECONDS)]
    command += [*program, *arguments]
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if not received and process is not None:
            process.send_signal(number)
        received.append(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            start_new_session=True,
        )
        if received:  # it came while the process was being made
            process.send_signal(received[0])
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code
