"""Ends that no Python code of ours can miss: of a child with its parent, and at an early Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = "fp8rl: stopped by Ctrl-C"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Ask the kernel to send this process the signal ``number`` when ``parent`` dies.

    Args:
        parent: process id of the parent, as the parent knows it.
        number: what to be sent; also if the parent has died before this call.
    """
    _libc.prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process inside this block, for loading modules before anything has begun.

    An exception would not do: extension modules that are interrupted while they load may abort, or
    swallow it and stay broken (NumPy under torch), and the run would go on without them.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":  # one of several says it for all
            print(STOPPED, file=sys.stderr, flush=True)
        os._exit(130)

    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
