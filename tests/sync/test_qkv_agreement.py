"""Megatron, Hugging Face and the live engine show the same q, k and v, within their rounding.

One policy, one set of sequences: the trainer's GPTModel, the same weights in transformers, and in a
real vLLM, quantized to FP8 with an FP8 KV cache. Both trainers compute in BF16, the engine with FP8
weights and cache, so its magnitudes differ by the quantization, and a scale by at most one power of
two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.engine.channel import ENVIRONMENT
from fp8rl.quant import (
    KVCalibrator,
    KVObservation,
    KVObserver,
    KVScaleRule,
    QuantPlan,
    quantize_blockwise,
)
from fp8rl.sync import HuggingFaceQKV, MegatronQKV, MegatronSource
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from fp8rl.trainer.megatron_model import hf_config
from tests.sync.qkv_engine_worker import NEW_TOKENS
from tests.sync.qkv_models import VOCAB, causal, config, gpt_model, sequences

pytestmark = pytest.mark.slow

TRAINERS_APART = 2.0**-5  # both BF16; their sums are rounded at other places
ENGINE_APART = 0.125  # FP8 weights and cache, over four layers; 0.05 found
TOKENS, REAL = sequences()
COUNT = int(REAL.sum())


@pytest.fixture(scope="module")
def policy() -> tuple[dict[str, Tensor], KVObservation]:
    """The trainer's weights under Hugging Face names, and what it observes on them."""
    with init_distributed(config()), cpu_stands_in(), torch.no_grad():
        model = gpt_model(config()).eval()
        source = MegatronQKV(model)
        seer = KVObserver(source.shape, histogram=True)
        with source.watch(seer) as watch:
            watch.token_mask = REAL
            model(TOKENS, torch.arange(12).expand_as(TOKENS), causal(12))
        exported = MegatronSource(model, hf_config(config().model, VOCAB, 64))
        weights = {name: tensor.clone().contiguous() for name, tensor in exported}
    return weights, seer.observation()


@pytest.fixture(scope="module")
def megatron(policy: tuple[Any, KVObservation]) -> KVObservation:
    return policy[1]


@pytest.fixture(scope="module")
def hugging_face(policy: tuple[dict[str, Tensor], Any]) -> KVObservation:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**hf_config(config().model, VOCAB, 64))).bfloat16().eval()
    model.load_state_dict(policy[0])
    source = HuggingFaceQKV(model)
    seer = KVObserver(source.shape, histogram=True)
    with source.watch(seer), torch.no_grad():
        model(TOKENS, attention_mask=REAL.long(), use_cache=False)
    return seer.observation()


@pytest.fixture(scope="module")
def engine(policy: tuple[dict[str, Tensor], Any], tmp_path_factory: Any) -> dict[str, Any]:
    """What a worker process of the real engine saw, by case."""
    folder = tmp_path_factory.mktemp("engine")
    described = hf_config(config().model, VOCAB, 64)
    plan = QuantPlan.from_hf_config(described)
    described["quantization_config"] = plan.quantization_config()
    tensors = {}
    for name, weight in policy[0].items():
        if plan.is_quantized(name):
            quantized = quantize_blockwise(weight)
            tensors |= {name: quantized.data, f"{name}_scale_inv": quantized.scale_inv}
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described))
    rows = [row[real].tolist() for row, real in zip(TOKENS, REAL, strict=True)]
    (folder / "sequences.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "tests.sync.qkv_engine_worker", str(folder)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def scales(found: KVObservation) -> Tensor:
    return KVCalibrator(KVScaleRule(), found.shape).scales(found, version=0).scales()


def observed(engine: dict[str, Any], case: str) -> KVObservation:
    return KVObservation.from_json(engine[case])


def test_the_three_see_the_same_model_and_tokens(
    megatron: KVObservation, hugging_face: KVObservation, engine: dict[str, Any]
) -> None:
    live = observed(engine, "prompts")
    assert megatron.shape == hugging_face.shape == live.shape
    assert megatron.tokens == hugging_face.tokens == live.tokens == COUNT
    assert engine["is a source"]


def test_the_trainers_agree_within_their_rounding(
    megatron: KVObservation, hugging_face: KVObservation
) -> None:
    assert torch.allclose(megatron.amax(), hugging_face.amax(), rtol=TRAINERS_APART)
    ratio = scales(megatron) / scales(hugging_face)
    assert set(ratio.unique().tolist()) <= {0.5, 1.0, 2.0}
    assert float((ratio == 1).double().mean()) >= 0.9


@pytest.mark.parametrize("trainer", ["megatron", "hugging_face"])
def test_the_engine_agrees_within_one_power_of_two(
    trainer: str, engine: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    found, live = request.getfixturevalue(trainer), observed(engine, "prompts")
    assert torch.allclose(live.amax(), found.amax(), rtol=ENGINE_APART)
    ratio = scales(live) / scales(found)
    assert set(ratio.unique().tolist()) <= {0.5, 1.0, 2.0}
    for layer in range(found.shape.layers):
        for x in "qkv":
            heads = [torch.tensor(one.head_amax(layer, x)) for one in (live, found)]
            assert torch.allclose(*heads, rtol=ENGINE_APART), (layer, x)


def test_the_engine_sees_each_real_row_once(engine: dict[str, Any]) -> None:
    prompts = observed(engine, "prompts")
    assert observed(engine, "prompts in turn").tokens == COUNT
    new = (NEW_TOKENS - 1) * len(TOKENS)  # the last one is not computed on
    assert observed(engine, "prompts and new tokens").tokens == COUNT + new
    assert engine["prompts in padded rows"] == prompts.to_json()
    assert sum(map(sum, engine["a profiling run"]["tokens_seen"])) == 0
    assert engine["hooks left"] == 0


def test_the_engine_refuses_what_would_be_seen_wrongly(engine: dict[str, Any]) -> None:
    assert "leave token_mask at None" in engine["a mask"]
    refused = engine["refusals"]
    assert "compilation mode DYNAMO_TRACE_ONCE and cudagraph_mode NONE" in refused["mode"]
    assert "cudagraph_mode FULL_AND_PIECEWISE" in refused["cudagraph_mode"]
    assert all("enforce_eager=True" in refused[x] for x in ("mode", "cudagraph_mode"))
    assert "Linear has no attention layer with k and v" in refused["no attention"]
