"""Ctrl-C that waits for the step to end: the first signal asks, the second insists.

While ``StopRequest`` is active, SIGINT and SIGTERM only set a flag that the loop reads between
steps, on all ranks at once; a second signal raises KeyboardInterrupt wherever it is.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context manager; ``agreed()`` tells every rank whether any rank was asked to stop."""

    def __init__(self) -> None:
        self._received = 0

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now; a collective, the same on every rank."""
        flag = torch.tensor(self._received)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        if self._received > 1:
            raise KeyboardInterrupt
