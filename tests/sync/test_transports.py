"""Every transport brings a payload whole, in order, to every worker; or says what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8rl.quant import EngineTensor
from fp8rl.sync import Broadcast, Files, SegmentError, SharedMemory, TransportError
from fp8rl.sync import slot_outbox as slots
from fp8rl.sync.errors import ManifestError
from fp8rl.sync.file_store import FileStore
from fp8rl.sync.inboxes import open_inbox
from fp8rl.sync.staging import Staging
from fp8rl.sync.transport import Stage, parse_introduction, parse_stage
from fp8rl.sync.transports import Transport

STAGE = 1000  # bytes of one stage in these tests


class Workers:
    """An engine of some workers, which takes in stages as the receiver does."""

    def __init__(self, workers: int, largest: int) -> None:
        expected = [EngineTensor("t", torch.uint8, (largest,))]
        self.stagings = [Staging(expected) for _ in range(workers)]
        self.stages: list[Stage] = []
        self.delay = 0.0
        self.error: Exception | None = None
        self._pool = ThreadPoolExecutor(workers)

    def introduce(self, introduction: dict[str, Any]) -> None:
        parsed = parse_introduction(introduction)
        ranks = range(len(self.stagings))
        self.inboxes = list(self._pool.map(lambda rank: open_inbox(parsed, rank), ranks))

    def take(self, content: dict[str, Any]) -> None:
        stage = parse_stage(content["stage"])
        self.stages.append(stage)
        time.sleep(self.delay)
        if self.error is not None:
            for inbox in self.inboxes:
                inbox.close()  # as the receiver does
            raise self.error
        each = zip(self.stagings, self.inboxes, strict=True)
        list(self._pool.map(lambda pair: pair[0].receive(stage, pair[1]), each))

    def payloads(self, nbytes: int) -> list[torch.Tensor]:
        return [staging.take(nbytes) for staging in self.stagings]


class Bench:
    """A transport with its engines."""

    def __init__(self, transport: Transport, workers: list[int], largest: int) -> None:
        self.engines = [Workers(n, largest) for n in workers]
        self.outbox = transport.open(largest, len(workers))
        self._pool = ThreadPoolExecutor(len(workers))

    def meet(self) -> None:
        introductions = self.outbox.introductions()
        joined = [
            self._pool.submit(engine.introduce, introduction)
            for engine, introduction in zip(self.engines, introductions, strict=True)
        ]
        self.outbox.connect()
        for one in joined:
            one.result()

    def send(self, content: dict[str, Any]) -> None:
        answers = [self._pool.submit(engine.take, content) for engine in self.engines]
        for answer in answers:
            answer.result()

    def carry(self, parts: list[torch.Tensor]) -> None:
        self.outbox.begin(sum(map(len, parts)), self.send)
        for part in parts:
            self.outbox.write(part)
            part.fill_(0xEE)  # the caller may do with its memory what it likes
        self.outbox.finish()


def random_parts(sizes: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator, dtype=torch.uint8) for n in sizes]


TRANSPORTS: dict[str, tuple[Transport, list[int]]] = {
    "shared memory, one engine": (SharedMemory(), [1]),
    "shared memory, three engines of two workers": (SharedMemory(), [2, 2, 2]),
    "broadcast, one engine": (Broadcast(timeout_seconds=5.0), [1]),
    "broadcast, engines of two workers and one": (
        Broadcast(workers=[2, 1], timeout_seconds=5.0),
        [2, 1],
    ),
}


@pytest.fixture(scope="module", params=TRANSPORTS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    transport, workers = TRANSPORTS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "STAGE_BYTES", STAGE)
        made = Bench(transport, workers, largest=20_000)
    made.meet()
    yield made
    made.outbox.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=st.lists(st.integers(1, 3 * STAGE), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_the_payload_arrives_whole_however_it_is_written(
    bench: Bench, sizes: list[int], seed: int
) -> None:
    parts = random_parts(sizes, seed)
    sent = torch.cat(parts)
    bench.carry(parts)
    for engine in bench.engines:
        assert all(torch.equal(payload, sent) for payload in engine.payloads(len(sent)))
        assert all(stage.nbytes <= STAGE for stage in engine.stages)


def test_no_slot_is_written_before_every_engine_has_copied_it(bench: Bench) -> None:
    bench.engines[-1].delay = 0.01
    parts = random_parts([500] * 20)
    sent = torch.cat(parts)
    bench.carry(parts)
    bench.engines[-1].delay = 0.0
    assert all(torch.equal(e.payloads(len(sent))[0], sent) for e in bench.engines)


def test_stages_are_on_their_way_while_the_next_is_written(bench: Bench) -> None:
    overlapped = threading.Event()
    writing = threading.Event()

    def send(content: dict[str, Any]) -> None:
        if writing.wait(timeout=5):
            overlapped.set()
        bench.send(content)

    parts = random_parts([STAGE, 10])
    bench.outbox.begin(STAGE + 10, send)
    bench.outbox.write(parts[0])  # full: it is announced, and not waited for
    writing.set()
    bench.outbox.write(parts[1])
    bench.outbox.finish()
    assert overlapped.is_set()
    for engine in bench.engines:
        engine.payloads(STAGE + 10)


def test_what_an_engine_refuses_is_heard_at_once_and_the_next_payload_arrives(
    bench: Bench,
) -> None:
    bench.engines[0].error = ManifestError("not now")
    began = time.perf_counter()
    with pytest.raises(ManifestError, match="not now"):
        bench.carry(random_parts([3 * STAGE]))
    assert time.perf_counter() - began < 3
    bench.outbox.abandon()
    bench.engines[0].error = None
    bench.meet()  # as a publisher does after every failure
    parts = random_parts([2 * STAGE + 7])
    sent = parts[0].clone()
    bench.carry(parts)
    assert all(torch.equal(e.payloads(len(sent))[0], sent) for e in bench.engines)


def test_a_payload_shorter_than_announced_is_refused(bench: Bench) -> None:
    bench.outbox.begin(500, bench.send)
    bench.outbox.write(random_parts([400])[0])
    with pytest.raises(TransportError, match="400 of 500 bytes"):
        bench.outbox.finish()
    bench.outbox.abandon()


class TestStaging:
    @pytest.fixture
    def staging(self) -> Staging:
        return Staging([EngineTensor("t", torch.float32, (16,))])

    class Inbox:
        def fetch(self, stage: Stage, out: torch.Tensor) -> None:
            out.fill_(7)

        def close(self) -> None:
            pass

    def take(self, staging: Staging, start: int, nbytes: int, total: int) -> None:
        staging.receive(Stage(start=start, nbytes=nbytes, total=total), self.Inbox())

    def test_a_payload_larger_than_the_model_is_refused_before_memory_is_taken(
        self, staging: Staging
    ) -> None:
        with pytest.raises(ManifestError, match=f"{2**50} bytes is announced, .* take 64"):
            self.take(staging, 0, 64, 2**50)

    def test_stages_come_in_order_without_gap_and_of_one_payload(self, staging: Staging) -> None:
        self.take(staging, 0, 16, 64)
        for start, nbytes, total in ((32, 16, 64), (16, 16, 48), (16, 64, 64)):
            with pytest.raises(ManifestError, match="stage"):
                self.take(staging, start, nbytes, total)
        with pytest.raises(ManifestError, match="came after 16 of 64"):
            staging.take(64)

    def test_the_payload_belongs_to_whoever_took_it(self, staging: Staging) -> None:
        self.take(staging, 0, 64, 64)
        taken = staging.take(64)
        self.take(staging, 0, 64, 64)
        staging.clear()
        assert taken.tolist() == [7] * 64
        with pytest.raises(ManifestError, match="came after 0 of 0"):
            staging.take(64)


HOSTILE = {
    "a file of the disk": {"kind": "shm", "path": "/etc/passwd", "nbytes": 10},
    "a path through a process": {"kind": "shm", "path": "/proc/self/../1/mem", "nbytes": 10},
    "a huge segment": {"kind": "shm", "path": "/proc/1/fd/0", "nbytes": 2**62},
    "no transport": {"kind": "pickle", "data": "gASVAAA="},
    "a field too many": {"kind": "files", "url": "/tmp", "code": "import os"},
    "nothing": {},
    "nobody there": {
        **{"kind": "broadcast", "backend": "gloo", "host": "127.0.0.1", "port": 1},
        **{"first_rank": 1, "timeout_seconds": 0.3},
    },
    "no store": {"kind": "files", "url": "nosuchprotocol://x"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_dead_introduction_is_refused(what: str) -> None:
    with pytest.raises((ManifestError, SegmentError, TransportError)):
        open_inbox(parse_introduction(HOSTILE[what]), 0)


def test_a_worker_that_never_joins_is_reported_in_time() -> None:
    outbox = Broadcast(timeout_seconds=0.5).open(1000, 1)
    outbox.introductions()
    with pytest.raises(TransportError, match="not everybody joined"):
        outbox.connect()
    outbox.close()


def test_the_meeting_point_listens_on_its_host_alone() -> None:
    import psutil

    outbox = Broadcast(timeout_seconds=0.5).open(1000, 1)
    [introduction] = outbox.introductions()
    mine = psutil.Process().net_connections("tcp")
    listening = [c.laddr for c in mine if c.status == psutil.CONN_LISTEN]
    assert [a.ip for a in listening if a.port == introduction["port"]] == ["127.0.0.1"]
    outbox.close()


def test_workers_of_every_engine_must_be_given() -> None:
    with pytest.raises(TransportError, match="for 2 engine"):
        Broadcast(workers=[1]).open(1000, 2)


def test_files_are_written_once_for_any_number_of_engines(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="written once"):
        Files(str(tmp_path)).open(1000, 2)
    assert FileStore(str(tmp_path)).versions() == []
