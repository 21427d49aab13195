"""The transports by name, as a trainer chooses one for its ``Publisher``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fp8rl.sync.broadcast import BroadcastOutbox
from fp8rl.sync.errors import TransportError
from fp8rl.sync.files import Files
from fp8rl.sync.shm import ShmOutbox
from fp8rl.sync.transport import Outbox


@dataclass(frozen=True)
class SharedMemory:
    """A ring in shared memory: trainer and engines on one host."""

    def open(self, largest_payload: int, engines: int) -> Outbox:
        """Make the ring; SegmentError where memory does not suffice."""
        return ShmOutbox(largest_payload, engines)


@dataclass(frozen=True)
class Broadcast:
    """One broadcast to the workers of all engines, over Gloo or NCCL.

    workers: of each engine, in their order: tensor parallel times pipeline parallel. host: the
    publishing host, as the engines reach it. timeout_seconds: for joining and for each stage.
    """

    workers: Sequence[int] = (1,)
    backend: Literal["gloo", "nccl"] = "gloo"
    host: str = "127.0.0.1"
    timeout_seconds: float = 60.0

    def open(self, largest_payload: int, engines: int) -> Outbox:
        """Open it; TransportError unless the workers of every engine are given."""
        if len(self.workers) != engines or min(self.workers) < 1:
            raise TransportError(
                f"Broadcast(workers={list(self.workers)}) for {engines} engine(s): give the number "
                "of workers of each, 1 or more"
            )
        return BroadcastOutbox(
            largest_payload, list(self.workers), self.backend, self.host, self.timeout_seconds
        )


Transport = SharedMemory | Broadcast | Files
