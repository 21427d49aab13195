"""Our server adapter, which is veRL's, and veRL's own way of bytes to a worker beside it.

veRL imports vLLM's version where it defines its adapter, and a GPU where it moves bytes. Here is
neither, so the version is said, and veRL is given a platform that is a CPU. Adapter, sender and
receiver are the real ones; the server is an actor that takes what comes as a worker would.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import ray
from verl.workers.config import CheckpointEngineConfig, RolloutConfig

from fp8rl.integrations.verl.settings import EXTENSION, WeightSyncError
from fp8rl.integrations.verl.wire import Sender
from tests import helpers
from tests.integrations.verl.test_weight_sync import assert_are_the_weights, opened

NAME = "vllm_server_0_0"  # veRL's, of the first replica
SAID = str(Path(__file__).parent / "said")


def stand_in() -> None:
    """Say which vLLM there would be, and that this is a CPU."""
    from verl.plugin.platform.platform_cuda import PlatformCUDA
    from verl.plugin.platform.platform_manager import set_platform

    if SAID not in sys.path:
        sys.path.append(SAID)  # the metadata of a vLLM
    version = ModuleType("verl.third_party.vllm")
    version.VLLM_SLEEP_LEVEL = 1  # type: ignore[attr-defined]
    sys.modules.setdefault(version.__name__, version)

    class CPU(PlatformCUDA):
        device_name = "cpu"  # type: ignore[assignment]
        device_module = SimpleNamespace(  # type: ignore[assignment]
            synchronize=lambda: None, empty_cache=lambda: None
        )

        def is_ipc_supported(self) -> bool:
            return False

    set_platform(CPU())


@ray.remote(num_cpus=0, max_concurrency=2)
class Server:
    """What veRL's adapter calls on a server."""

    def __init__(self) -> None:
        stand_in()
        self.calls: list[Any] = []

    def collective_rpc(self, method: str, timeout: Any, args: Any, kwargs: Any) -> None:
        import torch
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import (
            BucketedWeightReceiver,
        )

        job = ray.get_runtime_context().get_job_id()
        handle = f"ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"
        receiver = BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=kwargs["use_shm"])
        messages: list[Any] = []
        receiver.receive_weights(
            lambda bucket, _: messages.extend((name, data.clone()) for name, data in bucket)
        )
        self.calls.append((method, messages))

    def clear_kv_cache(self) -> None:
        self.calls.append("clear_kv_cache")

    def set_global_steps(self, steps: int) -> None:
        self.calls.append(steps)

    def take(self) -> list[Any]:
        found, self.calls = self.calls, []
        (method, messages), *rest = found
        if all(name.startswith("fp8rl/") for name, _ in messages):
            version, tensors = opened(messages)
            import torch

            views = {n: t.view(torch.uint8) if t.itemsize == 1 else t for n, t in tensors.items()}
            return [method, version, views, *rest]
        return [method, dict(messages), *rest]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        yield Server.options(name=NAME).remote()
    finally:
        ray.shutdown()


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(helpers.hf_config()))
    return str(tmp_path)


def adapter(monkeypatch: pytest.MonkeyPatch, backend: str, model: str, **changes: Any) -> Any:
    stand_in()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "1")
    from fp8rl.integrations.verl.server_adapter import ServerAdapter

    settings: dict[str, Any] = {
        "name": "vllm",
        "quantization": "fp8",
        "tensor_model_parallel_size": 1,
        "engine_kwargs": {"vllm": {"worker_extension_cls": EXTENSION}},
        "checkpoint_engine": CheckpointEngineConfig(
            backend=backend,
            update_weights_bucket_megabytes=64,
            engine_kwargs={"fp8rl": {"model_path": model}},
        ),
    }
    return ServerAdapter(RolloutConfig(**(settings | changes)), None, None)


def test_beside_the_trainer_each_rank_brings_what_it_quantized(
    server: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(monkeypatch, "fp8rl", model)
    for step in (3, 4):
        weights = iter(helpers.weights(step).items())
        asyncio.run(
            made.update_weights(weights, global_steps=step, peft_config=None, base_sync_done=True)
        )
        method, version, tensors, *rest = ray.get(server.take.remote())
        assert (method, version) == ("update_weights_from_ipc", step)
        assert rest == ["clear_kv_cache", step]
        assert_are_the_weights(tensors, step)


def test_what_our_checkpoint_engine_received_passes(
    server: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(monkeypatch, "fp8rl", model)
    from fp8rl.integrations.verl.settings import SyncSettings

    messages = Sender(SyncSettings(model_path=model)).stages(helpers.weights(5).items(), 9)
    asyncio.run(made.update_weights(messages, global_steps=9, wire_format="fp8rl"))
    _, version, tensors, *_ = ray.get(server.take.remote())
    assert version == 9
    assert_are_the_weights(tensors, 5)


def test_with_another_backend_it_is_veRLs(
    server: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(monkeypatch, "naive", model, quantization=None, engine_kwargs={})
    weights = helpers.weights(1)
    asyncio.run(made.update_weights(iter(weights.items()), global_steps=1))
    _, found, *rest = ray.get(server.take.remote())
    assert {name: bool((found[name] == weights[name]).all()) for name in weights} == dict.fromkeys(
        weights, True
    )
    assert rest == ["clear_kv_cache", 1]


def test_adapters_of_lora_are_refused(
    server: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(monkeypatch, "fp8rl", model)
    with pytest.raises(WeightSyncError, match="merge"):
        asyncio.run(made.update_weights(iter(()), peft_config={"r": 8}))


def test_a_server_that_could_not_take_them_is_refused_before_it_starts(
    server: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightSyncError, match="quantization=fp8"):
        adapter(monkeypatch, "fp8rl", model, quantization=None)
