"""The transport within a host: a ring of slots in shared memory.

    trainer   slot 0 | slot 1 | slot 0 ...     writes one while the engines copy another
    engine                    each worker copies into memory of its own, then the slot is free

The segment has no name in any folder (``segment.py``): it vanishes with the last process that has
it open. Engine and trainer run on one host, as one user, in one PID namespace.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from fp8rl.sync.segment import Segment
from fp8rl.sync.slot_outbox import SLOTS, SlotOutbox
from fp8rl.sync.transport import ShmIntroduction, Stage


class ShmOutbox(SlotOutbox):
    """Writes payloads into the ring, for any number of engines of this host."""

    def __init__(self, largest_payload: int, engines: int) -> None:
        """Make the ring; SegmentError where memory does not suffice."""
        super().__init__(largest_payload)
        self._engines = engines
        self._segment = Segment.create(SLOTS * self.slot_bytes)

    def introductions(self) -> list[dict[str, Any]]:
        """Where the ring lies; the same for every engine."""
        segment = self._segment
        introduction = ShmIntroduction(path=segment.path, nbytes=segment.nbytes)
        return [introduction.model_dump()] * self._engines

    def connect(self, answers: Sequence[Future[None]] = ()) -> None:
        """Nothing to meet: engines open the segment by its path."""

    def slot(self, number: int) -> UInt8[Tensor, " slot_bytes"]:
        """The memory of a slot."""
        return self._segment.view(number * self.slot_bytes, self.slot_bytes)

    def close(self) -> None:
        """Give the shared memory back."""
        super().close()
        self._segment.close()


class ShmInbox:
    """Reads stages from the trainer's ring."""

    def __init__(self, introduction: ShmIntroduction) -> None:
        """Attach the ring; raises SegmentError where it is none."""
        self._segment = Segment.attach(introduction.path, introduction.nbytes)

    def fetch(self, stage: Stage, out: UInt8[Tensor, " n"]) -> None:
        """Copy a slot's bytes; SegmentError where they lie outside the ring."""
        out.copy_(self._segment.view(stage.at, stage.nbytes))

    def close(self) -> None:
        """Let go of the ring."""
        self._segment.close()
