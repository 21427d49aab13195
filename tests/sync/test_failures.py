"""Whoever dies, and wherever: no mixed weights, a clear error, nothing leaked, the next is good.

Faults of the bytes and of the manifest are in test_transaction.py, those of files in test_files.py.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.errors import EngineDiedError, EngineError, StaleWeightsError
from fp8rl.sync import HTTPEngine, Publisher, SegmentError, slot_outbox
from fp8rl.sync.publisher import SyncReport
from tests import helpers
from tests.sync.dying_trainer import STAGE_BYTES
from tests.sync.vllm_server import TOKEN, Server

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PLAN = helpers.settings().plan()
PROMPTS = [[2 + (i * k) % 60 for i in range(40)] for k in (1, 3, 7)]
SAMPLING = Sampling(max_tokens=12, stop_token=helpers.EOS, samples=2)
OLD, NEW, GOOD = 1, 2, 3  # seeds
SECONDS = 10.0


def publish(publisher: Publisher, seed: int, version: int) -> SyncReport | None:
    scales = helpers.scales(version)
    return publisher.publish(helpers.source(seed), version=version, kv_scales=scales)


def segments(pid: int) -> int:
    """Rings of ours that a process and its children hold."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    rings = [
        line for one in family for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines()
    ]
    return sum("memfd:fp8rl-weights" in line for line in rings)


class TestTrainer:
    """The trainer is killed; the engine, a server that outlives it, is not."""

    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        started = Server(tmp_path_factory.mktemp("server"))
        try:
            started.wait()
            yield started
        finally:
            started.close()

    @pytest.fixture(scope="class")
    def fresh(self, server: Server) -> dict[int, list[int]]:
        """What the server answers after each seed alone; the first to be published to it."""
        answers = {}
        with (
            HTTPEngine(server.url, token=TOKEN) as engine,
            Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher,
        ):
            for seed in (OLD, NEW, GOOD):
                publish(publisher, seed, version=seed)
                answers[seed] = server.generate(16)["token_ids"]
        assert len({tuple(tokens) for tokens in answers.values()}) == 3
        return answers

    PHASES: ClassVar[
        dict[str, int | None]
    ] = {  # where it dies -> what is served then, None: nothing
        "introduced": OLD,
        "start": OLD,
        "stage 1": OLD,
        "stage 5": OLD,
        "manifest": OLD,
        "applying": None,
        "applied": None,
        "finish": NEW,
    }

    @pytest.mark.parametrize("phase", PHASES)
    def test_one_version_is_served_or_none_and_the_next_trainer_heals_it(
        self, phase: str, server: Server, fresh: dict[int, list[int]]
    ) -> None:
        version = 10 * (1 + list(self.PHASES).index(phase))
        with (
            HTTPEngine(server.url, token=TOKEN) as engine,
            Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher,
        ):
            publish(publisher, OLD, version)
        module = [sys.executable, "-m", "tests.sync.dying_trainer"]
        arguments = [server.url, str(version + 1), phase, str(NEW)]
        died = subprocess.run([*module, *arguments], cwd=ROOT, timeout=60)
        assert died.returncode == -signal.SIGKILL
        served = self.PHASES[phase]
        if served is None:
            time.sleep(1)  # until what the engine was doing is done
            assert server.paused
        else:
            assert server.generate(16)["token_ids"] == fresh[served]

        began = time.perf_counter()
        with (
            HTTPEngine(server.url, token=TOKEN) as engine,
            Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher,
        ):
            publish(publisher, GOOD, version + 2)
            assert time.perf_counter() - began < SECONDS
            assert server.generate(16)["token_ids"] == fresh[GOOD]
            assert segments(server.process.pid) == 1  # that of the publisher alive


class Deadly:
    """An engine's client that kills the engine."""

    def __init__(self, engine: RolloutEngine, phase: str) -> None:
        self.engine, self.phase, self.stages = engine, phase, 0

    def reached(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(self.engine.pid, signal.SIGKILL)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.init_weight_transfer_engine(init_info)
        self.reached("introduced")

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()
        self.reached("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "manifest" in update_info and self.phase == "applying":
            threading.Timer(0.01, os.kill, (self.engine.pid, signal.SIGKILL)).start()
        self.engine.update_weights(update_info)
        if "stage" in update_info:
            self.stages += 1
            self.reached(f"stage {self.stages}")
        elif "manifest" in update_info:
            self.reached("applied")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.finish_weight_update(weight_version)
        self.reached("finish")


class TestEngine:
    """The engine is killed; the trainer hears it at once, and goes on with a new one."""

    PHASES = ("introduced", "start", "stage 5", "applying", "applied", "finish")

    @pytest.fixture(scope="class")
    def expected(self, tmp_path_factory: pytest.TempPathFactory) -> Any:
        with RolloutEngine(helpers.settings(), tmp_path_factory.mktemp("fresh")) as engine:
            with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher:
                publish(publisher, GOOD, 0)
            return engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=1)

    @pytest.mark.parametrize("phase", PHASES)
    def test_the_trainer_hears_of_it_and_goes_on_with_another(
        self, phase: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slot_outbox, "STAGE_BYTES", STAGE_BYTES)
        dying = RolloutEngine(helpers.settings(), tmp_path / "dying")
        second = RolloutEngine(helpers.settings(), tmp_path / "second")
        with dying, second:
            dying.wait_ready()
            began = time.perf_counter()
            with pytest.raises(EngineDiedError, match=r"exit code -9"):
                with Publisher(PLAN, Deadly(dying, phase), kv_layers=helpers.LAYERS) as publisher:
                    publish(publisher, OLD, 0)
                dying.generate(PROMPTS, version=0, sampling=SAMPLING, seed=1)
            assert time.perf_counter() - began < SECONDS
            assert not psutil.pid_exists(dying.pid)
            gc.collect()  # the error's traceback knows the publisher
            assert segments(os.getpid()) == 0
            with Publisher(PLAN, second, kv_layers=helpers.LAYERS) as publisher:
                publish(publisher, GOOD, 0)
                answers = second.generate(PROMPTS, version=0, sampling=SAMPLING, seed=1)
        assert answers == expected
        assert not psutil.pid_exists(second.pid)


class TestRing:
    """The ring vanishes, or is somebody else's."""

    def test_a_ring_that_vanished_is_named_and_the_old_version_is_served(
        self, tmp_path: Path
    ) -> None:
        with RolloutEngine(helpers.settings(), tmp_path) as engine:
            with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher:
                publish(publisher, OLD, 0)
                before = engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=1)
            gone = {"kind": "shm", "path": f"/proc/{os.getpid()}/fd/999", "nbytes": 4096}
            info = {"publisher": "p", "transport": gone, "mirror": True}
            with pytest.raises(EngineError, match=r"SegmentError.*fd/999 cannot be opened"):
                engine.init_weight_transfer_engine(info)
            assert engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=1) == before
            with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as publisher:
                publish(publisher, GOOD, 1)

    def test_two_publishers_at_once_do_not_mix(self, tmp_path: Path) -> None:
        def answers(version: int) -> Any:
            return engine.generate(PROMPTS, version=version, sampling=SAMPLING, seed=1)

        with (
            RolloutEngine(helpers.settings(), tmp_path) as engine,
            Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as first,
        ):
            publish(first, OLD, 0)
            with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as second:
                before = answers(0)
                with pytest.raises(EngineError, match=r"PublisherError.*was replaced"):
                    publish(first, NEW, 1)
                assert answers(0) == before
                with pytest.raises(StaleWeightsError, match="version 1 were asked for"):
                    answers(1)
                publish(second, GOOD, 1)
                assert answers(1) != before

    def test_a_ring_that_does_not_fit_into_memory_is_refused(self) -> None:
        with pytest.raises(SegmentError, match="bytes are free"):
            slot_outbox_of(2**62)


def slot_outbox_of(nbytes: int) -> Any:
    from fp8rl.sync.segment import Segment

    return Segment.create(nbytes)
