"""Engines with FP8 weights, and without experts, asked for their routes; each starts its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fp8rl.config.file import parse_config
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.errors import EngineError
from fp8rl.quant import KVObserver, KVScales
from fp8rl.routing import compare_routes
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from tests.fp8rl.test_moe_routing import LAYERS, VOCAB, batch, config, settings


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp8", "fp8-kv"])
def test_an_fp8_engine_agrees_less(tmp_path: Path, precision: str) -> None:
    chosen = settings(precision)
    with init_distributed(config()), RolloutEngine(chosen, tmp_path) as engine:
        trainer, scales = MegatronTrainer(config(), VOCAB), None
        if chosen.fp8_kv:
            seen = trainer.observe_kv(batch(), KVObserver(trainer.attention_shape))
            scales = KVScales.from_amax(seen.amax(), version=0, tokens=seen.tokens)
        layers = LAYERS if chosen.fp8_kv else 0
        with Publisher(chosen.plan(), engine, kv_layers=layers) as publisher:
            publisher.publish(trainer.source(), version=0, kv_scales=scales)
        found = compare_routes(trainer, engine, batch(), 0)
    assert 0.8 < float(found["router/agreement"]) < 0.985
    assert 0.8 < float(found["router/top1_agreement"]) < 0.985
    assert found.keys() >= {f"router/agreement/{layer}" for layer in range(LAYERS)}


@pytest.mark.slow
@pytest.mark.long
def test_an_engine_without_experts_says_so_and_serves_on(tmp_path: Path) -> None:
    dense = parse_config({"model": {"num_layers": 1}})
    chosen = replace(settings(), hf_config=hf_config(dense.model, VOCAB, 64))
    with init_distributed(dense), RolloutEngine(chosen, tmp_path) as engine:
        trainer = MegatronTrainer(dense, VOCAB)
        with Publisher(chosen.plan(), engine) as publisher:
            publisher.publish(trainer.source(), version=0, kv_scales=None)
        with pytest.raises(EngineError, match="no layer with experts"):
            engine.observe_routes([[2, 3]], version=0)
        sampling = Sampling(max_tokens=4, stop_token=1)
        assert engine.generate([[2, 3]], version=0, sampling=sampling, seed=0)
