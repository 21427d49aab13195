"""The veRL half of weight sync: its registry, its manager, its configs, and real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from verl.checkpoint_engine import (
    CheckpointEngine,
    CheckpointEngineManager,
    CheckpointEngineRegistry,
)
from verl.workers.config import CheckpointEngineConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout

from fp8rl.integrations.verl import adapters, wire
from fp8rl.integrations.verl.settings import EXTENSION, SyncSettings, WeightSyncError, check_rollout
from fp8rl.integrations.verl.wire import MANIFEST, STAGE, Sender, manifest_of
from fp8rl.quant import KVScaleError, NonFiniteWeightError, quantize_blockwise
from fp8rl.sync import SourceError
from fp8rl.sync.admission import unpack
from fp8rl.sync.manifest import parse_manifest
from fp8rl.sync.transport import parse_stage
from tests import helpers

BUCKET = 2**27


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(helpers.hf_config()))
    return str(folder)


def opened(messages: list[tuple[str, Tensor]]) -> tuple[int, dict[str, Tensor]]:
    """Version and tensors of what came, as an engine unpacks them."""
    *stages, (name, last) = messages
    assert name == MANIFEST
    payload = torch.cat([data for _, data in stages])
    end = 0
    for place, data in stages:
        stage = parse_stage(json.loads(place.removeprefix(STAGE)))
        assert (stage.start, stage.nbytes, stage.total) == (end, len(data), len(payload))
        end += len(data)
    manifest = parse_manifest(manifest_of(last))
    return manifest.version, unpack(manifest, payload, None)


def assert_are_the_weights(tensors: dict[str, Tensor], seed: int) -> None:
    plan = helpers.settings("fp8").plan()
    assert set(tensors) == {tensor.name for tensor in plan.engine_tensors()}
    for name, weight in helpers.weights(seed).items():
        if plan.is_quantized(name):
            expected = quantize_blockwise(weight)
            assert torch.equal(tensors[name].view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(tensors[f"{name}_scale_inv"], expected.scale_inv)
        else:
            assert torch.equal(tensors[name], weight)


@pytest.mark.parametrize("stage_bytes", [1000, 2**26])
def test_a_version_is_the_quantized_weights_whatever_the_stages(
    model: str, stage_bytes: int
) -> None:
    sender = Sender(SyncSettings(model_path=model))
    weights = ((name, tensor.float()) for name, tensor in helpers.weights(3).items())
    version, tensors = opened(list(sender.stages(weights, 5, stage_bytes)))
    assert version == 5
    assert_are_the_weights(tensors, 3)


def test_versions_are_steps_and_go_on_where_a_step_comes_again(model: str) -> None:
    sender = Sender(SyncSettings(model_path=model))
    steps = [4, 4, None, 9]
    found = [opened(list(sender.stages(helpers.weights(0).items(), step)))[0] for step in steps]
    assert found == [4, 5, 6, 9]


def test_a_tied_head_is_left_out_once_it_is_seen_to_be_the_embedding(tmp_path: Path) -> None:
    config = helpers.hf_config() | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sender = Sender(SyncSettings(model_path=str(tmp_path)))
    weights = helpers.weights(1, config=config)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    _, tensors = opened(list(sender.stages((weights | head).items(), 0)))
    assert "lm_head.weight" not in tensors
    other = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    with pytest.raises(SourceError, match=r"ties lm_head\.weight"):
        list(sender.stages((weights | other).items(), 1))


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in helpers.weights(0).items() if key != name}


@pytest.mark.parametrize(
    ("weights", "error", "told"),
    [
        (without("model.norm.weight"), SourceError, "lacks 1 tensors: model.norm.weight"),
        (helpers.weights(0) | {"extra": torch.ones(1)}, SourceError, "extra: veRL yields it"),
        (
            helpers.weights(0) | {"model.norm.weight": torch.full((256,), torch.nan)},
            NonFiniteWeightError,
            "model.norm.weight",
        ),
    ],
)
def test_what_veRL_yields_must_be_the_model(
    model: str, weights: dict[str, Tensor], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        list(Sender(SyncSettings(model_path=model)).stages(weights.items(), 0))


def test_an_fp8_cache_gets_the_scales_of_its_version_or_nothing_is_sent(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_measures", [])
    sender = Sender(SyncSettings(model_path=model, kv_cache_dtype="fp8"))
    with pytest.raises(KVScaleError, match="use_kv_scales"):
        list(sender.stages(helpers.weights(0).items(), 3))
    wire.use_kv_scales(helpers.scales)
    _, tensors = opened(list(sender.stages(helpers.weights(0).items(), 3)))
    for name, scale in helpers.scales(3).tensors().items():
        assert torch.equal(tensors[name], scale)
    wire.use_kv_scales(lambda _: helpers.scales(1))
    with pytest.raises(KVScaleError, match="measured on version 1"):
        list(sender.stages(helpers.weights(0).items(), 4))


class Group:
    """A worker group as veRL's manager sees one."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers, self.world_size = workers, len(workers)

    def execute_checkpoint_engine(self, method: list[str], **kwargs: list[Any]) -> list[Any]:
        return [
            worker.execute.remote(method[i], **{name: values[i] for name, values in kwargs.items()})
            for i, worker in enumerate(self.workers)
        ]


@ray.remote(num_cpus=0)
class Worker:
    """A trainer rank or a rollout worker; makes its engine as veRL's workers do."""

    def __init__(self, **kwargs: Any) -> None:
        import verl.checkpoint_engine  # noqa: F401

        self.engine = CheckpointEngineRegistry.new("fp8rl", bucket_size=BUCKET, **kwargs)

    def execute(self, method: str, **kwargs: Any) -> Any:
        return getattr(self.engine, method)(**kwargs)

    async def send(self, seed: int, step: int, trouble: str | None = None) -> Any:
        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in helpers.weights(seed).items():
                if name == "model.layers.1.mlp.down_proj.weight":
                    if trouble == "KeyError":
                        raise KeyError(name)
                    if trouble is not None:
                        tensor[0, 0] = torch.nan
                yield name, tensor

        return await self.engine.send_weights(weights(), global_steps=step)

    async def receive(self, step: int) -> tuple[int, dict[str, Tensor]]:
        version, tensors = opened([m async for m in self.engine.receive_weights(step)])
        # Ray cannot carry FP8
        return version, {
            n: t.view(torch.uint8) if t.itemsize == 1 else t for n, t in tensors.items()
        }


@pytest.fixture(scope="module")
def groups(model: str) -> Iterator[tuple[Group, Group]]:
    """Two trainer ranks and two rollout workers, each a process."""
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        kwargs = {"model_path": model, "transport": "gloo", "timeout_seconds": 60}
        trainers = [Worker.remote(is_master=rank == 0, **kwargs) for rank in range(2)]
        rollouts = [Worker.remote(**kwargs) for _ in range(2)]
        yield Group(trainers), Group(rollouts)
    finally:
        ray.shutdown()


@pytest.fixture
def manager(groups: tuple[Group, Group]) -> Iterator[CheckpointEngineManager]:
    trainers, rollouts = groups
    config = CheckpointEngineConfig(backend="fp8rl")
    made = CheckpointEngineManager(config=config, actor_wg=trainers, replicas=[])
    made.build_process_group(rollouts)
    yield made
    for group in groups:
        ray.get(group.execute_checkpoint_engine(["finalize"] * group.world_size))


@pytest.mark.parametrize(("seed", "step"), [(1, 10), (2, 11)])
def test_every_rollout_worker_gets_the_version_that_rank_0_quantized(
    groups: tuple[Group, Group], manager: CheckpointEngineManager, seed: int, step: int
) -> None:
    trainers, rollouts = groups
    sent = [worker.send.remote(seed, step) for worker in trainers.workers]
    received = [worker.receive.remote(step) for worker in rollouts.workers]
    for version, tensors in ray.get(received):
        assert version == step
        assert_are_the_weights(tensors, seed)
    metrics, left_out = ray.get(sent)
    bf16 = sum(2 * tensor.numel() for tensor in helpers.weights(seed).values()) / 2**20
    assert metrics["checkpoint_engine/payload_mbytes"] < 0.6 * bf16 and left_out == {}


@pytest.mark.parametrize("trouble", ["NonFiniteWeightError", "KeyError"])
def test_an_update_that_fails_on_rank_0_reaches_nobody_and_everybody_is_told(
    groups: tuple[Group, Group], manager: CheckpointEngineManager, trouble: str
) -> None:
    """Also where veRL's own generator fails, whatever it raises."""
    trainers, rollouts = groups
    sent = [worker.send.remote(3, 12, trouble) for worker in trainers.workers]
    received = [worker.receive.remote(12) for worker in rollouts.workers]
    with pytest.raises(ray.exceptions.RayError, match=rf"{trouble}.*down_proj"):
        ray.get(sent[0])
    for answer in received:
        with pytest.raises(ValueError, match=rf"gave the update up: {trouble}.*down_proj"):
            ray.get(answer)


def test_the_engine_is_veRLs_interface() -> None:
    engine = CheckpointEngineRegistry.get("fp8rl")
    assert issubclass(engine, CheckpointEngine) and not engine.__abstractmethods__


def rollout(**changes: Any) -> RolloutConfig:
    settings: dict[str, Any] = {
        "name": "vllm",
        "quantization": "fp8",
        "checkpoint_engine": CheckpointEngineConfig(backend="fp8rl"),
        "engine_kwargs": {"vllm": {"worker_extension_cls": EXTENSION}},
    }
    return RolloutConfig(**(settings | changes))


def test_a_rollout_that_can_take_our_updates_is_let_pass() -> None:
    check_rollout(rollout())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "sglang"}, "rollout.name=vllm, found sglang"),
        ({"quantization": None}, "rollout.quantization=fp8, found None"),
        ({"engine_kwargs": {}}, f"worker_extension_cls={EXTENSION}, found None"),
        (
            {
                "checkpoint_engine": CheckpointEngineConfig(
                    backend="fp8rl", update_weights_bucket_megabytes=32
                )
            },
            "update_weights_bucket_megabytes is 32",
        ),
    ],
)
def test_one_that_cannot_is_refused_by_its_key(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(WeightSyncError, match=told):
        check_rollout(rollout(**changes))


def test_adapters_of_other_rollouts_ask_before_they_start() -> None:
    class Adapter(BaseRollout):
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            self.config = config

        async def resume(self, tags: list[str]) -> None: ...

        async def release(self) -> None: ...

        async def update_weights(self, weights: Any, **kwargs: Any) -> None: ...

    asking = adapters._asking(Adapter)
    naive = rollout(name="sglang", checkpoint_engine=CheckpointEngineConfig(backend="naive"))
    assert asking(config=naive).config is naive
    with pytest.raises(WeightSyncError, match="found sglang"):
        asking(config=rollout(name="sglang"))


def test_unknown_settings_are_refused(model: str) -> None:
    with pytest.raises(ValueError, match="modelpath"):
        CheckpointEngineRegistry.new("fp8rl", bucket_size=BUCKET, modelpath=model)
