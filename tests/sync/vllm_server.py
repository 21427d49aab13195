"""A vLLM HTTP server in a process of its own, as users start one, and requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from fp8rl.engine.channel import ENVIRONMENT
from tests import helpers

TOKEN = "a-token"
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
            "worker-extension-cls": "fp8rl.sync.worker_extension.WorkerExtension",
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
