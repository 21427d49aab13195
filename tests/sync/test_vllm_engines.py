"""vLLM as users start it: a server, paused until proven, or an ``LLM`` within the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.quant import KVScaleError
from fp8rl.sync import EngineCallError, HTTPEngine, Publisher, UpdateRefusedError
from tests import helpers
from tests.sync.vllm_server import PROMPT, TOKEN, Server

pytestmark = pytest.mark.long

PLAN = helpers.settings().plan()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def publisher(server: Server) -> Iterator[Publisher]:
    with (
        HTTPEngine(server.url, token=TOKEN) as engine,
        Publisher(PLAN, engine, kv_layers=helpers.LAYERS, deltas=True) as made,
    ):
        yield made


def publish(publisher: Publisher, seed: int, version: int) -> None:
    publisher.publish(helpers.source(seed), version=version, kv_scales=helpers.scales(version))


def test_a_server_that_holds_no_proven_weights_is_paused(
    server: Server, publisher: Publisher
) -> None:
    assert server.paused
    publish(publisher, seed=1, version=1)
    assert not server.paused
    assert server.http.get("/weight_info").json() == {"weight_version": "1"}


def test_it_answers_as_an_engine_of_our_own(
    server: Server, publisher: Publisher, tmp_path: Path
) -> None:
    publish(publisher, seed=2, version=2)
    greedy = Sampling(max_tokens=16, stop_token=63, temperature=0.0)
    with RolloutEngine(helpers.settings(), tmp_path) as engine:
        with Publisher(PLAN, engine, kv_layers=helpers.LAYERS) as fresh:
            publish(fresh, seed=2, version=2)
        [[sample]] = engine.generate([PROMPT], version=2, sampling=greedy, seed=0)
    tokens = server.generate(16)["token_ids"]
    assert tuple(tokens[: len(sample.tokens)]) == sample.tokens


def test_an_update_lands_in_the_middle_of_an_answer_and_every_token_has_its_version(
    server: Server, publisher: Publisher
) -> None:
    publish(publisher, seed=3, version=3)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.generate, 450)
        time.sleep(0.3)
        publish(publisher, seed=4, version=4)
        spans = answer.result()["weight_versions"]
    assert [span["version"] for span in spans] == ["3", "4"], spans
    assert server.generate(4)["weight_versions"][0]["version"] == "4"


def test_an_update_that_fails_is_undone_and_the_server_serves_on(
    server: Server, publisher: Publisher
) -> None:
    publish(publisher, seed=5, version=5)
    before = server.generate(16)["token_ids"]
    with pytest.raises(KVScaleError, match="measured on version 1"):
        publisher.publish(helpers.source(6), version=6, kv_scales=lambda: helpers.scales(1))
    assert not server.paused
    assert server.generate(16)["token_ids"] == before
    assert server.http.get("/weight_info").json() == {"weight_version": "5"}
    publish(publisher, seed=6, version=7)
    assert server.generate(16)["token_ids"] != before


def test_without_a_mirror_a_failed_update_leaves_the_server_paused_until_a_good_one(
    server: Server,
) -> None:
    with (
        HTTPEngine(server.url, token=TOKEN) as engine,
        Publisher(PLAN, engine, kv_layers=helpers.LAYERS, mirror=False) as forgetful,
    ):
        publish(forgetful, seed=1, version=10)
        with pytest.raises(KVScaleError):
            forgetful.publish(helpers.source(6), version=11, kv_scales=lambda: helpers.scales(1))
        assert server.paused
        publish(forgetful, seed=1, version=12)
        assert not server.paused


def test_what_the_server_refuses_is_in_the_error(server: Server) -> None:
    with (
        HTTPEngine(server.url, token=TOKEN) as engine,
        Publisher(PLAN, engine) as without_scales,  # the engine's cache is FP8
        pytest.raises(UpdateRefusedError, match=r"ManifestError.*6 missing: .*attn\.q_scale"),
    ):
        without_scales.publish(helpers.source(1), version=20, kv_scales=None)
    assert not server.paused


def test_a_server_that_is_not_there_is_named() -> None:
    named = r"127\.0\.0\.1:9/init.* cannot be reached"
    with (
        HTTPEngine("http://127.0.0.1:9") as engine,
        pytest.raises(EngineCallError, match=named),
    ):
        Publisher(PLAN, engine)


def test_an_llm_within_the_trainer_is_updated_and_says_when_not_to_be_asked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sync.in_process_worker", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["at first"] == "no weights have been published yet"
    assert seen["kinds"] == ["full", "delta", "full"]  # after a refusal everything is sent
    assert seen["served"] == [None, "1"]
    assert "measured on version 1" in seen["refused"]
    assert seen["after the refusal"] == [None, True]
    assert seen["answers"] == [True, True]
