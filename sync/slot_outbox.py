"""Cuts a payload into stages: slots that are filled while others are on their way.

    fill slot 0 | fill slot 1 | wait for 0, fill it | ...      the caller
                | carry 0     | carry 1             | ...      one thread, in order

A slot is filled again only after its stage was carried: announced to every engine, and copied by
it. So no engine reads bytes that change, and quantizing overlaps with the transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

from jaxtyping import UInt8
from torch import Tensor

from fp8rl.sync.errors import TransportError
from fp8rl.sync.transport import STAGE_BYTES, Send, Stage, Start

SLOTS = 2


class SlotOutbox(ABC):
    """What outboxes with slots share; they say where the slots lie and how a stage is carried."""

    def __init__(self, largest_payload: int) -> None:
        """A payload of at most ``largest_payload`` bytes needs no larger slots than that."""
        self.slot_bytes = min(STAGE_BYTES, largest_payload)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fp8rl-outbox")
        self._carried: list[Future[None]] = []  # by stage
        self._send: Send | None = None
        self._start_update: Start | None = None
        self._total = self._start = self._filled = 0

    @abstractmethod
    def slot(self, number: int) -> UInt8[Tensor, " slot_bytes"]:
        """The memory of a slot."""

    def carry(self, stage: Stage, data: UInt8[Tensor, " n"], send: Send) -> None:
        """Bring a stage, whose bytes are ``data``, to every engine."""
        send({"stage": stage.model_dump()})

    def begin(self, nbytes: int, send: Send, start: Start | None = None) -> None:
        """Begin a payload; see ``Outbox``."""
        self.abandon()
        self._send, self._start_update, self._total = send, start, nbytes

    def write(self, data: UInt8[Tensor, " n"]) -> None:
        """Copy bytes into slots, and have every slot carried that is full."""
        while len(data):
            if self._filled == 0:
                self._wait_for_slot()
            room = min(len(data), self.slot_bytes - self._filled)
            here = self.slot(len(self._carried) % SLOTS)
            here[self._filled : self._filled + room].copy_(data[:room])
            self._filled += room
            data = data[room:]
            if self._filled == self.slot_bytes:
                self._dispatch()

    def finish(self) -> None:
        """Have the rest carried and wait for every stage."""
        if self._filled:
            self._dispatch()
        for carried in self._carried:
            carried.result()
        if self._start != self._total:
            raise TransportError(f"{self._start} of {self._total} bytes of a payload were written")

    def abandon(self) -> None:
        """Wait until no engine reads a slot any more, whatever its answer, and forget the rest."""
        for carried in self._carried:
            if not carried.cancel():
                carried.exception()
        self._carried, self._send, self._start_update = [], None, None
        self._total = self._start = self._filled = 0

    def close(self) -> None:
        """Stop the thread, without waiting for an engine that does not answer."""
        self._carried, self._send = [], None
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _wait_for_slot(self) -> None:
        """Wait until the stage that used this slot before was carried; raises what it met."""
        earlier = len(self._carried) - SLOTS
        if earlier >= 0:
            self._carried[earlier].result()

    def _dispatch(self) -> None:
        if self._send is None:
            raise TransportError("bytes were written before a payload was begun")
        if self._start_update is not None and not self._carried:
            self._start_update()
        number = len(self._carried) % SLOTS
        stage = Stage(
            start=self._start,
            nbytes=self._filled,
            total=self._total,
            at=number * self.slot_bytes,
        )
        data = self.slot(number)[: self._filled]
        self._carried.append(self._thread.submit(self.carry, stage, data, self._send))
        self._start += self._filled
        self._filled = 0
