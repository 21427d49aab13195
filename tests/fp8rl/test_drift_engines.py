"""The probe on live engines: what it finds of one model, and of faults, by layer and source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.drift.watch import DriftWatch
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError, StaleWeightsError
from fp8rl.quant import KVCalibrator, KVScales
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

VOCAB, LAYERS = 64, 2
MOE = {
    "family": "qwen3_moe",
    "num_experts": 8,
    "experts_per_token": 2,
    "moe_ffn_hidden_size": 128,
}
pytestmark = pytest.mark.slow


def config(rollout: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    shape = {"num_layers": LAYERS, "init_std": 0.06, **model}
    return parse_config({"model": shape, "rollout": rollout, "drift": {"every": 1}})


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCAB, (40, 24), generator=generator)
    lengths = torch.randint(8, 25, (40, 1), generator=generator)
    return TokenBatch(tokens, (torch.arange(24) >= 4) & (torch.arange(24) < lengths))


@dataclass
class Parts:
    trainer: MegatronTrainer
    engine: RolloutEngine
    watch: DriftWatch
    config: RunConfig
    version: int = -1
    scales: KVScales | None = None

    def publish(self, scales_of: float = 1.0) -> None:
        """The trainer's weights, with KV scales for ``scales_of`` times what they are to hold."""
        self.version += 1
        if self.engine.settings.fp8_kv:
            rule = KVCalibrator(self.config.kv_scales, self.trainer.attention_shape)
            seen = self.trainer.observe_kv(batch(), rule.observer())
            amax = seen.amax() * scales_of
            self.scales = KVScales.from_amax(amax, version=self.version, tokens=seen.tokens)
        layers = LAYERS if self.scales else 0
        with Publisher(self.engine.settings.plan(), self.engine, kv_layers=layers) as publisher:
            publisher.publish(self.trainer.source(), version=self.version, kv_scales=self.scales)

    def probe(self) -> dict[str, float]:
        found = self.watch.probe(batch(), self.version, self.scales)
        return {key: float(value) for key, value in found.items()}

    def damage(self, what: str, layer: int) -> None:
        self.engine._call("damage", what=what, layer=layer)


@contextmanager
def opened(folder: Path, rollout: dict[str, Any], model: dict[str, Any]) -> Iterator[Parts]:
    made = config(rollout, model)
    settings = EngineSettings(
        hf_config=hf_config(made.model, VOCAB, 64),
        precision=made.rollout.precision,
        max_model_len=64,
        max_num_seqs=64,
        kv_cache_bytes=2**24,
        activations=made.rollout.activations,
    )
    with (
        init_distributed(made),
        RolloutEngine(settings, folder, module="tests.fp8rl.drift_worker") as engine,
    ):
        trainer = MegatronTrainer(made, VOCAB, settings.plan())
        yield Parts(trainer, engine, DriftWatch(made, trainer, engine, settings.plan()), made)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Parts]:
    """BF16 beside BF16."""
    with opened(tmp_path, {"precision": "bf16"}, {}) as parts:
        yield parts


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """All that can be FP8, with experts."""
    rollout = {"precision": "fp8-kv", "activations": "fp8"}
    with opened(tmp_path_factory.mktemp("moe"), rollout, MOE) as parts:
        yield parts


def layers_beyond(parts: Parts, found: dict[str, float]) -> set[int]:
    """The layers of the thresholds that are passed; log-probs may follow."""
    keys = [key.split("/") for key in parts.watch.beyond(found)]
    return {int(layer) for _, layer, _ in (key for key in keys if len(key) == 3)}


def test_the_residual_stream_of_one_model_is_the_same_in_engine_and_trainer(plain: Parts) -> None:
    plain.publish()
    found = plain.probe()
    assert found["drift/embedding"] == 0.0, "rows of one table"
    for layer in range(LAYERS):
        assert 0 < found[f"drift/{layer}/own"] < 0.015, "BF16 has 8 bits, 2^-9 = 0.002 at most"
        assert found[f"drift/{layer}/unexplained"] == found[f"drift/{layer}/own"]
        assert found[f"drift/{layer}/total"] < 0.02
    assert found["drift/head"] < 0.01 and found["drift/logprob"] < 0.02
    assert found["drift/warnings"] == 0
    assert not any(name.endswith(("weights", "cache", "router")) for name in found)


def test_roundings_explain_the_engine_and_none_of_them_is_a_fault(moe: Parts) -> None:
    moe.publish()
    found = moe.probe()
    assert found["drift/warnings"] == 0 and moe.watch.warnings(found) == []
    for layer in range(LAYERS):
        part = {name: found[f"drift/{layer}/{name}"] for name in ("weights", "activations")}
        assert all(0.01 < value < 0.1 for value in part.values()), part
        assert 0.02 < found[f"drift/{layer}/cache"] < 0.15
        assert found[f"drift/{layer}/unexplained"] < 0.06
        assert found[f"drift/{layer}/misrouted"] < 0.03
        assert found[f"drift/{layer}/own"] > 1.5 * found[f"drift/{layer}/unexplained"]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_weight_that_changes_after_the_proof_is_unexplained_in_its_layer(
    moe: Parts, layer: int
) -> None:
    moe.publish()
    moe.damage("weight", layer)
    found = moe.probe()
    assert layers_beyond(moe, found) == {layer}
    assert found[f"drift/{layer}/unexplained"] > 0.1
    said = moe.watch.warnings(found)
    assert any(f"drift in layer {layer}: " in w and "is unexplained" in w for w in said), said
    assert moe.watch.warnings(moe.probe()) == [], "told once"
    moe.trainer.load_state(_nudged(moe.trainer))  # what is equal is not sent again
    moe.publish()
    assert moe.probe()["drift/warnings"] == 0, "the next update heals it"
    assert moe.watch.warnings(moe.probe()) == []


def test_a_kernel_that_takes_another_scale_is_unexplained_in_its_layer(moe: Parts) -> None:
    moe.publish()
    moe.damage("key", 1)
    found = moe.probe()
    moe.damage("key_mended", 1)
    assert layers_beyond(moe, found) == {1} and found["drift/1/unexplained"] > 0.1
    assert moe.probe()["drift/warnings"] == 0


def test_a_scale_that_is_not_the_published_one_is_refused_before_any_probe(moe: Parts) -> None:
    moe.publish()
    moe.damage("scale", 1)
    with pytest.raises(StaleWeightsError, match=r"layers\.1.*k_scale"):
        moe.probe()
    moe.damage("scale_mended", 1)
    assert moe.probe()["drift/warnings"] == 0


def test_scales_that_were_measured_wrongly_are_the_caches_doing(moe: Parts) -> None:
    moe.publish(scales_of=1 / 16)
    found = moe.probe()
    assert set(moe.watch.beyond(found)) - {"drift/logprob"} == {"drift/0/cache", "drift/1/cache"}
    said = "".join(moe.watch.warnings(found))
    assert "lost in the KV cache (also in layers" in said and "recalibrate" in said
    moe.publish()
    assert moe.probe()["drift/warnings"] == 0


def test_planted_outliers_of_k_show_as_the_cache_of_their_layer(moe: Parts) -> None:
    before = moe.trainer.state()
    planted = {name: tensor.clone() for name, tensor in before.items()}
    for kind in ("model", "master"):
        norm = planted[f"{kind}/decoder.layers.1.self_attention.k_layernorm.weight"]
        norm.view(-1)[:16] *= 30
    moe.publish()
    clean = moe.probe()
    moe.trainer.load_state(planted)
    moe.publish()
    found = moe.probe()
    moe.trainer.load_state(before)
    assert found["drift/1/cache"] > 1.15 * clean["drift/1/cache"], "the range of E4M3 is wide"
    assert found["drift/1/own"] > 1.3 * clean["drift/1/own"]
    for name in ("cache", "own"):
        assert found[f"drift/0/{name}"] == pytest.approx(clean[f"drift/0/{name}"], rel=0.05)


def test_a_router_that_is_not_the_published_one_is_named(moe: Parts) -> None:
    moe.publish()
    moe.damage("router", 0)
    found = moe.probe()
    moe.damage("router_mended", 0)
    assert layers_beyond(moe, found) == {0}
    assert "drift/0/misrouted" in moe.watch.beyond(found)
    assert found["drift/0/misrouted"] > 0.5 and found["drift/0/router"] > 0.5
    assert found["drift/1/misrouted"] < 0.03 and found["drift/0/unexplained"] < 0.1
    assert moe.probe()["drift/warnings"] == 0


def test_a_probe_asks_for_a_version_and_for_an_engine_at_rest(moe: Parts) -> None:
    moe.publish()
    with pytest.raises(StaleWeightsError, match=f"version {moe.version + 1} were asked for"):
        moe.engine.observe_streams([[2, 3]], version=moe.version + 1, routes=True)
    sampling = Sampling(max_tokens=60, stop_token=1)
    many = [[2, 3]] * 64  # some go on for long
    ticket = moe.engine.submit(many, version=moe.version, sampling=sampling, seed=0)
    with pytest.raises(EngineError, match="in flight; collect them before the engine shows"):
        moe.engine.observe_streams([[2, 3, 4]], version=moe.version, routes=True)
    moe.engine.collect(ticket)
    seen = moe.engine.observe_streams([[2, 3, 4]], version=moe.version, routes=True)
    assert seen.stream.shape == (2, LAYERS + 1, 256) and seen.logprobs.shape == (2,)
    assert seen.routes is not None and seen.routes.shape == (2, LAYERS, 2)


def _nudged(trainer: MegatronTrainer) -> dict[str, torch.Tensor]:
    """The trainer's state with every weight a little larger."""
    return {
        name: tensor * 1.01 if name.startswith(("model/", "master/")) else tensor
        for name, tensor in trainer.state().items()
    }
