"""A vLLM server that users start themselves: paused until proven, updated while it serves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fp8rl.engine_channel import ENVIRONMENT
from fp8rl.quant import KVScaleError
from fp8rl.rollout import RolloutEngine, Sampling
from fp8rl.sync import EngineCallError, HTTPEngine, Publisher
from tests import helpers

pytestmark = pytest.mark.long

TOKEN = "a-token"
PLAN = helpers.settings().plan()
PROMPT = [2 + i % 60 for i in range(40)]


class Server:
    """A running server, and requests to it."""

    def __init__(self, folder: Path) -> None:
        arguments = helpers.settings().llm_arguments(folder)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
            port = free.getsockname()[1]
        flags = {
            "model": arguments["model"],
            "host": "127.0.0.1",
            "port": port,
            "api-key": TOKEN,
            "dtype": "bfloat16",
            "kv-cache-dtype": "fp8",
            "kv-cache-memory-bytes": arguments["kv_cache_memory_bytes"],
            "max-model-len": 512,
            "max-num-seqs": 8,
            "load-format": "dummy",
            "logprobs-mode": "processed_logprobs",
            "weight-transfer-config": json.dumps({"backend": "fp8rl"}),
        }
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command = [*module, "--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        environment = {k: v for k, v in ENVIRONMENT.items() if "MULTIPROCESSING" not in k}
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )

    def wait(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def generate(self, max_tokens: int) -> dict[str, Any]:
        body = {
            "token_ids": PROMPT,
            "sampling_params": {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True},
        }
        response = self.http.post("/inference/v1/generate", json=body)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    @property
    def paused(self) -> bool:
        return bool(self.http.get("/is_paused").json()["is_paused"])

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(30)


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
        pytest.raises(EngineCallError, match=r"6 missing: .*attn\.q_scale"),
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
