"""A Qwen2 policy in the real engine: its biases arrive, are proven, and are what it samples with.

Parameter by parameter, see test_trainer.py (Hugging Face), test_trainer_layouts.py (ranks) and
tests/sync/test_engine_state.py (damage).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from tests import helpers
from tests.fp8rl.test_trainer_aligned import token_batch

pytestmark = pytest.mark.slow

VOCAB = 64
PROMPTS = [[2 + (i * k) % 60 for i in range(1, 9)] for k in range(1, 33)]
SAMPLING = Sampling(max_tokens=24, stop_token=helpers.EOS, samples=2)
TRAINER = {"bf16": "bf16", "fp8-kv": "fp8-aligned"}  # with the engine's weights


def config(precision: str) -> RunConfig:
    return parse_config(
        {
            "model": {"family": "qwen2", "num_layers": helpers.LAYERS, "init_std": 0.1},
            "trainer": {"precision": TRAINER[precision], "micro_batch_size": 64},
            "rollout": {"precision": precision},
        }
    )


def set_biases(trainer: MegatronTrainer, size: float) -> None:
    """Draw the biases, which begin at zero, from N(0, size)."""
    state, generator = trainer.state(), torch.Generator().manual_seed(1)
    for name in (n for n in state if n.startswith("master/") and n.endswith(".bias")):
        state[name] = size * torch.randn(state[name].shape, generator=generator)
        state[name.replace("master/", "model/")] = state[name].bfloat16()
    trainer.load_state(state)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.long), "fp8-kv"])
def test_the_engine_samples_with_the_trainers_policy(precision: str, tmp_path: Path) -> None:
    settings = EngineSettings(
        hf_config=hf_config(config(precision).model, VOCAB, 64),
        precision=precision,  # type: ignore[arg-type]
        max_model_len=64,
        max_num_seqs=64,
        kv_cache_bytes=16 * 2**20,
    )
    plan, scales, layers = settings.plan(), None, 0
    if settings.fp8_kv:
        scales, layers = helpers.scales(0, factor=2.0), helpers.LAYERS
    with init_distributed(config(precision)):
        trainer = MegatronTrainer(config(precision), VOCAB, plan)
        set_biases(trainer, 1.0)
        engine = RolloutEngine(settings, tmp_path)
        with engine, Publisher(plan, engine, kv_layers=layers) as publisher:
            report = publisher.publish(trainer.source(), version=0, kv_scales=scales)
            groups = engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=5)
        assert report.tensors == len(plan.engine_tensors()) + 3 * layers  # each of them proven
        b, behaviour = token_batch(PROMPTS, groups)
        apart = (trainer.log_probs(b) - behaviour)[b.response_mask].abs().mean()
        set_biases(trainer, 0.0)
        without = (trainer.log_probs(b) - behaviour)[b.response_mask].abs().mean()
    assert int(b.response_mask.sum()) > 600
    assert apart < 0.1 * without, "biases must matter, and be those of the trainer"
