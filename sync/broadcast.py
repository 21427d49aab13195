"""The transport over a network: ``torch.distributed`` broadcasts, Gloo or NCCL.

    rank 0           the trainer rank that publishes
    ranks 1 .. n     every worker of every engine that has come, engine by engine

They meet at a store of the trainer's: workers write themselves in; once every engine is there, or
has said that it does not come, the trainer writes down who is in, and these make the group.

The group is its own: it needs no default group and joins none, so trainer and engines keep theirs.
A stage is announced to all engines and broadcast at the same time; an engine that refuses is heard
at once, and the group, in which others may be waiting, is given up; the next publish meets anew.
Bytes are sent once by rank 0, whatever the number of engines. Over NCCL they pass through device
memory, one stage at a time.

An engine that dies within a stage breaks the group for all; what lies in memory is sent again to
those that are left (``update.py``), else the publish fails.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

from fp8rl.sync.errors import TransportError
from fp8rl.sync.slot_outbox import SLOTS, SlotOutbox
from fp8rl.sync.transport import BroadcastIntroduction, Send, Stage

POLL_SECONDS = 0.001
ROSTER = "fp8rl/roster"  # the workers that are in: their ranks, a space between them


class BroadcastOutbox(SlotOutbox):
    """Broadcasts payloads to the workers of several engines."""

    def __init__(
        self,
        largest_payload: int,
        workers: list[int],
        backend: Literal["gloo", "nccl"],
        host: str,
        timeout_seconds: float,
    ) -> None:
        """``workers``: of each engine. ``host``: this host, as the engines reach it."""
        super().__init__(largest_payload)
        firsts = [1 + sum(workers[:i]) for i in range(len(workers))]
        self._workers = [range(first, first + n) for first, n in zip(firsts, workers, strict=True)]
        self._backend, self._host = backend, host
        self._timeout = timeout_seconds
        self._slots = torch.empty((SLOTS, self.slot_bytes), dtype=torch.uint8)
        self._announcer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fp8rl-announce")
        self._store: Store | None = None
        self._group: _Group | None = None

    def introductions(self) -> list[dict[str, Any]]:
        """Where to meet; opens the meeting point, on ``host`` alone, at a port of its own."""
        self._group = None
        with socket.create_server((self._host, 0)) as listener:
            port = listener.getsockname()[1]
            self._store = TCPStore(
                self._host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._timeout),
                master_listen_fd=listener.detach(),
            )
        return [
            BroadcastIntroduction(
                backend=self._backend,
                host=self._host,
                port=port,
                first_rank=workers.start,
                timeout_seconds=self._timeout,
            ).model_dump()
            for workers in self._workers
        ]

    def connect(self, answers: Sequence[Future[None]] = ()) -> None:
        """Make the group of the engines that have come; see ``Outbox``.

        Raises TransportError where one neither comes nor says that it does not.
        """
        assert self._store is not None  # introductions come first
        deadline = time.monotonic() + self._timeout
        while late := self._late(answers):
            if time.monotonic() > deadline:
                self._store.set(ROSTER, "")
                raise TransportError(
                    f"not everybody joined within {self._timeout} s: engine(s) {late} did not come"
                )
            time.sleep(POLL_SECONDS)
        roster = [
            rank
            for i, workers in enumerate(self._workers)
            if not _refused(answers, i)
            for rank in workers
        ]
        self._store.set(ROSTER, " ".join(map(str, roster)))
        if roster:
            self._group = _Group(self._backend, self._store, 0, roster, self._host, self._timeout)

    def slot(self, number: int) -> UInt8[Tensor, " slot_bytes"]:
        """The memory of a slot."""
        return self._slots[number]

    def carry(self, stage: Stage, data: UInt8[Tensor, " n"], send: Send) -> None:
        """Announce a stage and broadcast it meanwhile."""
        if self._group is None:
            raise TransportError("the group of a broadcast that failed is gone; publish again")
        answer = self._announcer.submit(send, {"stage": stage.model_dump()})
        try:
            self._group.broadcast(data, answer)
        except TransportError as error:
            self._group = None
            cause = _cause(answer, self._timeout)
            if cause is None:
                raise
            raise cause from error
        if answer.exception() is not None:
            self._group = None
        answer.result()

    def _late(self, answers: Sequence[Future[None]]) -> list[int]:
        """The engines that have neither come nor said that they do not."""
        assert self._store is not None
        return [
            i
            for i, workers in enumerate(self._workers)
            if not _refused(answers, i)
            and not self._store.check([_joined(rank) for rank in workers])
        ]

    def close(self) -> None:
        """Leave the group."""
        super().close()
        self._announcer.shutdown(wait=False)
        self._group = self._store = None


class BroadcastInbox:
    """An engine worker's place in the group."""

    def __init__(self, introduction: BroadcastIntroduction, worker: int) -> None:
        """Join; raises TransportError where the trainer, or another worker, is not there."""
        timeout, rank = introduction.timeout_seconds, introduction.first_rank + worker
        try:
            store = TCPStore(
                introduction.host,
                introduction.port,
                is_master=False,
                timeout=timedelta(seconds=timeout),
            )
            store.set(_joined(rank), "")
            roster = [int(one) for one in store.get(ROSTER).split()]
        except (RuntimeError, ValueError) as error:
            place = f"{introduction.host}:{introduction.port}"
            raise TransportError(f"the trainer cannot be met at {place}: {error}") from error
        if rank not in roster:
            raise TransportError(f"the trainer did not wait for rank {rank}; it has {roster}")
        self._group = _Group(introduction.backend, store, rank, roster, introduction.host, timeout)

    def fetch(self, stage: Stage, out: UInt8[Tensor, " n"]) -> None:
        """Take part in the broadcast of a stage."""
        self._group.broadcast(out)

    def close(self) -> None:
        """Leave the group."""
        del self._group


class _Group:
    """A process group outside of the default one, whose rank 0 broadcasts to those in a roster."""

    def __init__(
        self,
        backend: str,
        store: Store,
        rank: int,
        roster: Sequence[int],
        host: str,
        timeout: float,
    ) -> None:
        everybody = [0, *roster]
        rank, size = everybody.index(rank), len(everybody)
        self._cuda = backend == "nccl"
        self._timeout = timeout
        limit = timedelta(seconds=timeout)
        try:
            if self._cuda:
                nccl = dist.ProcessGroupNCCL.Options()
                nccl._timeout = limit
                self._group: Any = dist.ProcessGroupNCCL(store, rank, size, nccl)
            else:
                gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                gloo._timeout = limit
                gloo._devices = [_device(host)]
                self._group = dist.ProcessGroupGloo(store, rank, size, gloo)
        except (RuntimeError, ValueError) as error:
            raise TransportError(
                f"rank {rank} of {size}: not everybody joined within {timeout} s: {error}"
            ) from error

    def broadcast(self, data: UInt8[Tensor, " n"], answer: Future[None] | None = None) -> None:
        """Send ``data`` from rank 0 into that of the others.

        answer: that of the engines; if it is an error the broadcast is not waited for any longer.
        """
        moved = data.cuda() if self._cuda else data
        try:
            work = self._group.broadcast([moved], _from_rank_0())
            if not _wait(work, answer, time.monotonic() + self._timeout):
                return
        except (RuntimeError, ValueError) as error:
            raise TransportError(
                f"a stage of {len(data)} bytes was not broadcast: {error}"
            ) from error
        if self._cuda:
            data.copy_(moved)


def _cause(answer: Future[None], timeout: float) -> BaseException | None:
    """What the engines answered, if they gave up; a broken broadcast is only its consequence."""
    try:
        return answer.exception(timeout)
    except TimeoutError:
        return None


def _wait(work: Any, answer: Future[None] | None, deadline: float) -> bool:
    """Wait for a broadcast; False where the answer says that nobody will take part in it."""
    while not work.is_completed():
        if answer is not None and answer.done() and answer.exception() is not None:
            return False
        if time.monotonic() > deadline:
            raise TransportError("not everybody took part in time")
        time.sleep(POLL_SECONDS)
    work.wait()
    return True


def _joined(rank: int) -> str:
    """What a worker writes itself in with."""
    return f"fp8rl/joined/{rank}"


def _refused(answers: Sequence[Future[None]], engine: int) -> bool:
    if engine >= len(answers) or not answers[engine].done():
        return False
    return answers[engine].exception() is not None


def _from_rank_0() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return options


def _device(host: str) -> Any:
    """The network device for Gloo: loopback where the meeting point is, else this host's own."""
    if host == "localhost" or _is_loopback(host):
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    return dist.ProcessGroupGloo.create_default_device()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
