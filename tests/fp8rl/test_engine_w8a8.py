"""rollout.activations and rollout.scale_format: asked for, refused, started, updated, rolled back.

What the kernels compute is in tests/sync/test_engine_w8a8.py, the trainer that is aligned with
them in test_trainer_aligned.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.config.file import parse_config
from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import ConfigError, EngineError
from fp8rl.report.words import describe
from fp8rl.sync.publisher import Publisher
from fp8rl.sync.source import IterableSource
from tests import helpers

PROMPTS = [[2 + (i * k) % 60 for i in range(40)] for k in (1, 3, 7)]
SAMPLING = Sampling(max_tokens=12, stop_token=helpers.EOS, samples=2)
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize("asked", [{"activations": "fp8"}, {"scale_format": "fp32"}])
@pytest.mark.parametrize("precision", ["bf16", "kv-only"])
def test_what_is_for_fp8_weights_is_refused_without_them(
    precision: str, asked: dict[str, Any]
) -> None:
    (key,) = asked
    message = f"rollout.{key}={asked[key]} is for FP8 weights, .* rollout.precision={precision}"
    with pytest.raises(ConfigError, match=message):
        parse_config({"rollout": {"precision": precision, **asked}})
    with pytest.raises(ConfigError, match=message):
        replace(helpers.settings(precision), **asked)


def test_by_default_an_engine_computes_as_vllm_does(tmp_path: Path) -> None:
    rollout = parse_config({}).rollout
    assert (rollout.activations, rollout.scale_format) == (None, "pow2")
    settings = helpers.settings("fp8")
    assert (settings.activations, settings.plan().scale_format) == (None, "pow2")
    assert settings.llm_arguments(tmp_path)["quantization"] is None


def test_on_a_cpu_fp8_activations_are_asked_for_by_name(tmp_path: Path) -> None:
    settings = replace(helpers.settings("fp8"), activations="fp8", scale_format="fp32")
    assert settings.llm_arguments(tmp_path)["quantization"] == "fp8rl-w8a8"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"  # the checkpoint stays vLLM's
    assert settings.plan().scale_format == "fp32"


def test_on_cuda_fp8_is_what_happens_and_bf16_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = replace(helpers.settings("fp8"), activations="fp8")
    assert settings.llm_arguments(tmp_path)["quantization"] is None
    with pytest.raises(ConfigError, match="activations is bf16, but on CUDA vLLM's FP8 kernels"):
        replace(settings, activations="bf16")


def test_the_title_of_a_run_says_it() -> None:
    rollout = {"precision": "fp8", "activations": "fp8", "scale_format": "fp32"}
    title = describe(parse_config({"rollout": rollout}).model_dump(mode="json"))
    assert "FP8 activations (W8A8), fp32 weight scales" in title
    assert "activations" not in describe(parse_config({}).model_dump(mode="json"))


class Forgetful(EngineSettings):
    """Asks for W8A8, and starts an engine without."""

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        return super().llm_arguments(model_dir) | {"quantization": None}


@pytest.mark.slow
@pytest.mark.long
def test_an_engine_whose_layers_compute_otherwise_than_was_asked_is_refused(tmp_path: Path) -> None:
    settings = helpers.settings("fp8")
    asked = Forgetful(**vars(settings) | {"activations": "fp8"})
    layer = "worker 0: model.layers.0.self_attn.qkv_proj takes its input in bf16"
    with RolloutEngine(asked, tmp_path) as engine, pytest.raises(EngineError) as error:
        engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=0)
    assert f"in 8 tensor(s), so nothing is sent to it: {layer}, and activations is fp8" in str(
        error.value
    )


class Compiled(EngineSettings):
    """An engine that vLLM may compile, as benchmarks of speed start it."""

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        return super().llm_arguments(model_dir) | {"enforce_eager": False}


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_engine_with_experts_takes_fp8_activations_too(tmp_path: Path) -> None:
    settings = Compiled(**vars(variants()["experts, fp32 scales"]))
    with (
        RolloutEngine(settings, tmp_path) as engine,
        Publisher(settings.plan(), engine) as publisher,
    ):
        source = IterableSource(weights(settings, seed=0))
        publisher.publish(source, version=0, kv_scales=None)
        assert all(len(s) == SAMPLING.samples for s in answers(engine, version=0))
        [worker] = engine.worker_report()
    assert set(worker["activations"].values()) == {"fp8"}


def weights(settings: EngineSettings, seed: int, step: float = 0.0) -> dict[str, torch.Tensor]:
    """A policy, and those near it."""
    tensors = helpers.weights(seed, config=dict(settings.hf_config))
    generator = torch.Generator().manual_seed(99)
    for name, tensor in tensors.items():
        tensors[name] = tensor * (1 + step * torch.randn(tensor.shape, generator=generator)).to(
            tensor.dtype
        )
    return tensors


@dataclass
class Wire:
    """The engine as a client that can give an update up after it was applied."""

    engine: RolloutEngine
    broken: bool = False
    publisher: str = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.publisher = init_info["publisher"]
        self.engine.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self.broken:
            self.engine.update_weights({"publisher": self.publisher, "abandon": "given up"})
            raise EngineError("the wire broke")
        self.engine.finish_weight_update(weight_version)


def answers(engine: RolloutEngine, version: int) -> list[list[tuple[Any, ...]]]:
    groups: list[list[Sample]] = engine.generate(
        PROMPTS, version=version, sampling=SAMPLING, seed=3
    )
    return [[(s.tokens, s.logprobs) for s in group] for group in groups]


def variants() -> dict[str, EngineSettings]:
    one = replace(helpers.settings("fp8"), activations="fp8")
    two = replace(helpers.settings("fp8", tensor_parallel=2), activations="fp8")
    experts, of_two = (dict(settings.hf_config) | EXPERTS for settings in (one, two))
    return {
        "experts, fp32 scales": replace(one, hf_config=experts, scale_format="fp32"),
        "dense, two workers": two,
        "experts, two workers": replace(two, hf_config=of_two),
    }


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("variant", variants())
def test_updates_whole_and_as_deltas_are_proven_and_broken_ones_rolled_back(
    variant: str, tmp_path: Path
) -> None:
    settings = variants()[variant]
    (tmp_path / "live").mkdir()
    (tmp_path / "fresh").mkdir()
    with RolloutEngine(settings, tmp_path / "live") as engine:
        wire = Wire(engine)
        with Publisher(settings.plan(), wire, deltas=True) as publisher:

            def publish(version: int, tensors: dict[str, torch.Tensor]) -> str:
                source = IterableSource(tensors)
                report = publisher.publish(source, version=version, kv_scales=None)
                assert report is not None
                return report.kind

            assert publish(0, weights(settings, seed=0)) == "full"
            assert publish(1, weights(settings, seed=0, step=1e-3)) == "delta"
            held = answers(engine, version=1)
            for worker in engine.worker_report():
                assert set(worker["activations"].values()) == {"fp8"}
                assert worker["tensors_proven"] == len(settings.plan().engine_tensors())
            wire.broken = True
            with pytest.raises(EngineError, match="the wire broke"):
                publish(2, weights(settings, seed=5))
            assert answers(engine, version=1) == held
            wire.broken = False
            publish(3, weights(settings, seed=2))
            updated = answers(engine, version=3)
    with (
        RolloutEngine(settings, tmp_path / "fresh") as engine,
        Publisher(settings.plan(), engine) as publisher,
    ):
        source = IterableSource(weights(settings, seed=2))
        publisher.publish(source, version=3, kv_scales=None)
        assert answers(engine, version=3) == updated != held
