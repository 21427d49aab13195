"""Several live engines, as users run them: replicas, and one that follows files.

Every engine must answer as a fresh one that was given the same weights, bit for bit, whatever way
they came: whole, as differences, through memory, a network, or files.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.errors import EngineDiedError, StaleWeightsError
from fp8rl.quant import KVScales
from fp8rl.sync import Broadcast, EnginesError, FileFollower, Files, Publisher
from fp8rl.sync.source import IterableSource
from tests import helpers

pytestmark = pytest.mark.long

SAMPLING = Sampling(max_tokens=12, stop_token=helpers.EOS, samples=2)
PROMPTS = [[2 + (i * k) % 60 for i in range(40)] for k in (1, 3, 7)] + [[5, 6, 7]]
PLAN = helpers.settings().plan()


def stepped(seed: int, steps: int) -> IterableSource:
    """Weights of a seed after some small steps: neighbours of one another, as in training."""
    weights = helpers.weights(seed)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for tensor in weights.values():
            grown = torch.rand(tensor.shape, generator=generator) < 0.01
            tensor[grown] *= 1.0625
    return IterableSource(weights)


def answers(engine: RolloutEngine, version: int) -> list[Any]:
    groups = engine.generate(PROMPTS, version=version, sampling=SAMPLING, seed=11)
    return [[words(sample, version) for sample in group] for group in groups]


def words(sample: Sample, version: int) -> Any:
    assert set(sample.versions) == {version}
    return sample.tokens, sample.logprobs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RolloutEngine]]:
    """Two engines of one model."""
    engines = [
        RolloutEngine(helpers.settings(), tmp_path_factory.mktemp(name)) for name in ("a", "b")
    ]
    yield engines
    for engine in engines:
        engine.close()


class Fresh:
    """What an engine answers that is given a version whole, from nothing."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.version = 0

    def answers(self, seed: int, steps: int) -> list[Any]:
        self.version += 1
        self.engine.sleep(level=2)  # whatever it held is gone
        self.engine.wake_up()
        with Publisher(PLAN, self.engine, kv_layers=helpers.LAYERS) as publisher:
            scales = helpers.scales(self.version)
            publisher.publish(stepped(seed, steps), version=self.version, kv_scales=scales)
        return answers(self.engine, self.version)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    with RolloutEngine(helpers.settings(), tmp_path_factory.mktemp("fresh")) as engine:
        with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher:
            publisher.publish(stepped(9, 0), version=0, kv_scales=helpers.scales(0))
        yield Fresh(engine)


VERSIONS = iter(range(1, 1000))


@pytest.mark.parametrize("way", ["shared memory", "broadcast"])
def test_replicas_are_updated_together_whole_and_by_differences(
    way: str, pair: list[RolloutEngine], fresh: Fresh
) -> None:
    transport = Broadcast(workers=[1, 1], timeout_seconds=20.0) if way == "broadcast" else None
    with Publisher(
        PLAN, pair, transport=transport, kv_layers=helpers.LAYERS, deltas=True
    ) as publisher:
        for steps, kind in enumerate(("full", "delta", "delta")):
            version = next(VERSIONS)
            report = publisher.publish(
                stepped(1, steps), version=version, kv_scales=helpers.scales(version)
            )
            assert report is not None and (report.kind, report.failed) == (kind, {})
        expected = fresh.answers(1, 2)
        assert answers(pair[0], version) == answers(pair[1], version) == expected
        digests = {engine.worker_report()[0]["digest"] for engine in pair}
        assert len(digests) == 1


def test_an_engine_that_lost_its_base_gets_everything(
    pair: list[RolloutEngine], fresh: Fresh
) -> None:
    with Publisher(PLAN, pair, kv_layers=helpers.LAYERS, deltas=True) as publisher:

        def publish(steps: int) -> str:
            version = next(VERSIONS)
            scales = helpers.scales(version)
            report = publisher.publish(stepped(2, steps), version=version, kv_scales=scales)
            assert report is not None and report.failed == {}
            self_version.append(version)
            return report.kind

        self_version: list[int] = []
        assert [publish(0), publish(1)] == ["full", "delta"]
        for engine in pair:
            engine.sleep(level=2)
            engine.wake_up()
        assert publish(2) == "full"  # they say so, and it is sent from the ledger
        assert publish(3) == "delta"
        assert answers(pair[0], self_version[-1]) == fresh.answers(2, 3)


def test_an_engine_follows_files(pair: list[RolloutEngine], fresh: Fresh, tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    with Publisher(
        PLAN, files, transport=files, kv_layers=helpers.LAYERS, deltas=True
    ) as publisher:
        follower = FileFollower(str(tmp_path), pair[0])
        for steps in range(3):
            version = next(VERSIONS)
            scales = helpers.scales(version)
            publisher.publish(stepped(3, steps), version=version, kv_scales=scales)
            if steps != 1:  # it was away for one
                assert follower.step() == version
    assert answers(pair[0], version) == fresh.answers(3, 2)


def test_one_replica_dies_and_the_others_go_on(pair: list[RolloutEngine], fresh: Fresh) -> None:
    alive, dying = pair
    with Publisher(PLAN, pair, kv_layers=helpers.LAYERS) as publisher:
        os.kill(dying.pid, signal.SIGKILL)
        version = next(VERSIONS)
        began = time.perf_counter()
        report = publisher.publish(
            stepped(4, 0), version=version, kv_scales=helpers.scales(version)
        )
        assert time.perf_counter() - began < 10
        assert report is not None and list(report.failed) == [1]
        assert "EngineDiedError" in report.failed[1]
        assert answers(alive, version) == fresh.answers(4, 0)
        with pytest.raises(EngineDiedError):
            answers(dying, version)
        os.kill(alive.pid, signal.SIGKILL)
        with pytest.raises(EnginesError, match=r"(?s)none of 2 engines.*engine 0.*engine 1"):
            publisher.publish(
                stepped(4, 1), version=version + 1, kv_scales=helpers.scales(version + 1)
            )
    with pytest.raises((EngineDiedError, StaleWeightsError)):
        answers(alive, version + 1)


def test_both_workers_of_a_tensor_parallel_engine_are_updated_and_proven(tmp_path: Path) -> None:
    settings = helpers.settings(tensor_parallel=2)
    plan = settings.plan()

    def weights(steps: int) -> IterableSource:
        tensors = helpers.weights(5, config=dict(settings.hf_config))
        generator = torch.Generator().manual_seed(1)
        for tensor in list(tensors.values()) * steps:
            tensor[torch.rand(tensor.shape, generator=generator) < 0.01] *= 1.0625
        return IterableSource(tensors)

    with RolloutEngine(settings, tmp_path) as engine:
        with Publisher(plan, engine, kv_layers=helpers.LAYERS, deltas=True) as publisher:
            for version, kind in enumerate(("full", "delta")):
                report = publisher.publish(
                    weights(version), version=version, kv_scales=helpers.scales(version)
                )
                assert report is not None and report.kind == kind
            updated = answers(engine, 1)
            first, second = engine.worker_report()
            assert first["digest"] == second["digest"]
            assert first["kv_scales_proven"] == second["kv_scales_proven"] == 3 * helpers.LAYERS

            def measure() -> KVScales:
                seen = engine.observe_kv(PROMPTS, histogram=False)
                assert seen.tokens == sum(map(len, PROMPTS))
                raise RuntimeError("changed my mind")

            with pytest.raises(RuntimeError, match="changed my mind"):
                publisher.publish(weights(3), version=2, kv_scales=measure)
            assert answers(engine, 1) == updated  # undone in both workers
        with Publisher(plan, engine, kv_layers=helpers.LAYERS) as publisher:
            publisher.publish(weights(1), version=3, kv_scales=helpers.scales(3))
        assert answers(engine, 3) == updated
