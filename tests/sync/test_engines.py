"""Replicas come and go between updates; who is there is updated, and nobody waits for the others.

Clients that take payloads in as engines do, without the engines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8rl.quant import EngineTensor
from fp8rl.sync import (
    Broadcast,
    EngineCallError,
    EnginesError,
    Publisher,
    SharedMemory,
    TransportError,
)
from fp8rl.sync.inboxes import open_inbox
from fp8rl.sync.manifest import Manifest, parse_manifest
from fp8rl.sync.publisher import SyncReport
from fp8rl.sync.source import IterableSource
from fp8rl.sync.staging import Staging
from fp8rl.sync.transport import Inbox, parse_introduction, parse_stage
from fp8rl.sync.transports import Transport
from tests import helpers

PLAN = helpers.settings("fp8").plan()
TRANSPORTS: dict[str, Transport] = {
    "shared memory": SharedMemory(),
    "broadcast": Broadcast(workers=[1, 1], timeout_seconds=20.0),
}


class Replica:
    """A client of an engine that may be away, and knows nothing of before when it is back."""

    def __init__(self) -> None:
        self.away = False
        self.introductions = 0
        self.versions: list[int] = []
        self.start()

    def start(self) -> None:
        """As a process that was started anew."""
        self.inbox: Inbox | None = None
        self.applied: Manifest | None = None
        self.staging = Staging(
            [*PLAN.engine_tensors(), EngineTensor("room", torch.uint8, (2**20,))]
        )

    def die(self) -> None:
        self.away = True
        if self.inbox is not None:
            self.inbox.close()
        self.start()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.answer()
        self.introductions += 1
        self.inbox = open_inbox(parse_introduction(init_info["transport"]), 0)

    def start_weight_update(self) -> None:
        self.answer()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.answer()
        if "stage" in update_info:
            assert self.inbox is not None
            self.staging.receive(parse_stage(update_info["stage"]), self.inbox)
        elif "manifest" in update_info:
            self.applied = parse_manifest(update_info["manifest"])
            self.staging.take(self.applied.payload_nbytes)  # it came, whole

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.answer()
        assert weight_version is not None
        self.versions.append(int(weight_version))

    def answer(self) -> None:
        if self.away:
            raise EngineCallError("the replica is away")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Transport:
    return TRANSPORTS[request.param]


@pytest.fixture
def replicas() -> list[Replica]:
    return [Replica(), Replica()]


@pytest.fixture
def publisher(replicas: list[Replica], transport: Transport) -> Iterator[Publisher]:
    with Publisher(PLAN, replicas, transport=transport, deltas=True) as made:
        yield made


def publish(publisher: Publisher, version: int) -> SyncReport:
    weights = helpers.weights(0)
    weights["model.norm.weight"] += version / 8
    began = time.perf_counter()
    report = publisher.publish(IterableSource(weights), version=version, kv_scales=None)
    assert time.perf_counter() - began < 10, "somebody was waited for"
    assert report is not None
    return report


def test_a_replica_that_dies_is_missed_and_taken_in_again_when_it_is_back(
    publisher: Publisher, replicas: list[Replica]
) -> None:
    staying, leaving = replicas
    assert [publish(publisher, version).kind for version in (0, 1)] == ["full", "delta"]
    leaving.die()
    for version in (2, 3):
        report = publish(publisher, version)
        assert report.failed == {1: "EngineCallError: the replica is away"}
        assert report.kind == "delta", "the others hold the base"
    leaving.away = False
    report = publish(publisher, 4)
    assert (report.kind, report.failed) == ("full", {}), "it holds nothing"
    assert publish(publisher, 5).kind == "delta"
    assert staying.versions == [0, 1, 2, 3, 4, 5]
    assert leaving.versions == [0, 1, 4, 5]


def test_as_long_as_nobody_leaves_nobody_is_introduced_again(
    publisher: Publisher, replicas: list[Replica]
) -> None:
    for version in range(3):
        publish(publisher, version)
    assert [replica.introductions for replica in replicas] == [1, 1]


def test_all_may_go_and_come_back(publisher: Publisher, replicas: list[Replica]) -> None:
    publish(publisher, 0)
    for replica in replicas:
        replica.die()
    for version in (1, 2):
        with pytest.raises(EnginesError, match="none of 2 engines took the update: engine 0"):
            publish(publisher, version)
    for replica in replicas:
        replica.away = False
    assert (publish(publisher, 3).kind, publish(publisher, 4).kind) == ("full", "delta")
    assert [replica.versions for replica in replicas] == [[0, 3, 4]] * 2


def test_a_run_begins_with_those_that_are_there(
    replicas: list[Replica], transport: Transport
) -> None:
    replicas[0].away = True
    with Publisher(PLAN, replicas, transport=transport, deltas=True) as publisher:
        assert list(publish(publisher, 0).failed) == [0]
        replicas[0].away = False
        assert publish(publisher, 1).failed == {}
    assert [replica.versions for replica in replicas] == [[1], [0, 1]]


class DiesInAStage(Replica):
    """Dies as soon as bytes are on their way to it, if it is told to."""

    doomed = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.doomed:
            self.doomed = False
            self.die()
        super().update_weights(update_info)


def test_differences_are_sent_again_where_a_replica_dies_within_a_stage(
    transport: Transport,
) -> None:
    staying, leaving = Replica(), DiesInAStage()
    with Publisher(PLAN, [staying, leaving], transport=transport, deltas=True) as publisher:
        publish(publisher, 0)
        leaving.doomed = True
        report = publish(publisher, 1)
        assert (report.kind, list(report.failed)) == ("delta", [1])
        assert publish(publisher, 2).kind == "delta"
        leaving.away = False
        assert publish(publisher, 3).failed == {}
    assert (staying.versions, leaving.versions) == ([0, 1, 2, 3], [0, 3])


def test_whole_weights_that_a_dying_replica_kept_from_all_are_published_again(
    transport: Transport,
) -> None:
    staying, leaving = Replica(), DiesInAStage()
    leaving.doomed = True
    with Publisher(PLAN, [staying, leaving], transport=transport) as publisher:
        if isinstance(transport, Broadcast):
            with pytest.raises(TransportError, match="not broadcast"):
                publish(publisher, 0)
        assert list(publish(publisher, 1).failed) == [1]
    assert staying.versions == [1]
