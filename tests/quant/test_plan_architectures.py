"""The plan's tensors are those of the real models, and real sizes come out as they should."""

import math
import time

import pytest
import torch
from safetensors import safe_open

from fp8rl.quant import QuantPlan, QuantPlanError

from .plan_models import DEEPSEEK_V3, QWEN3_8B, QWEN3_30B_A3B, TINY

NEVER = ("embed", "lm_head", "norm", ".gate.", "bias")


@pytest.mark.parametrize("model", TINY)
def test_tensors_are_those_that_the_real_model_saves(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**TINY[model])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    assert {e.name: e.shape for e in QuantPlan.from_hf_config(TINY[model]).entries} == shapes
    written = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {e.name: e.shape for e in QuantPlan.from_hf_config(written).entries} == shapes


@pytest.mark.parametrize("model", TINY)
def test_exactly_the_matrices_of_decoder_layers_are_quantized_but_for_routers(model):
    for entry in QuantPlan.from_hf_config(TINY[model]).entries:
        assert entry.quantized != any(part in entry.name for part in NEVER), entry
        assert entry.quantized == (entry.dtype == torch.float8_e4m3fn)


@pytest.mark.parametrize("model", TINY)
def test_no_pattern_reaches_what_is_never_quantized(model):
    kept = QuantPlan.from_hf_config(TINY[model], keep_patterns=["*"])
    assert not any(e.quantized for e in kept.entries)
    for module in ("lm_head", "model.embed_tokens", "*.gate", "*norm"):
        with pytest.raises(QuantPlanError, match="matches no linear module"):
            QuantPlan.from_hf_config(TINY[model], keep_patterns=[module])


@pytest.mark.parametrize(
    ("config", "billions", "quantized", "share"),
    [
        (QWEN3_8B, 8.19, 36 * 7, 0.848),
        (QWEN3_30B_A3B, 30.53, 48 * (4 + 3 * 128), 0.979),
        (DEEPSEEK_V3, 671.03, 61 * 5 + 3 * 3 + 58 * 3 * 257, 0.997),
    ],
)
def test_real_models_have_their_known_size(config, billions, quantized, share):
    entries = QuantPlan.from_hf_config(config).entries
    total = sum(math.prod(e.shape) for e in entries)
    in_fp8 = sum(math.prod(e.shape) for e in entries if e.quantized)
    assert total / 1e9 == pytest.approx(billions, abs=0.005)
    assert sum(e.quantized for e in entries) == quantized
    assert in_fp8 / total == pytest.approx(share, abs=0.0005)


def test_the_largest_model_is_planned_and_audited_in_seconds():
    began = time.process_time()
    plan = QuantPlan.from_hf_config(DEEPSEEK_V3, keep_first_layers=3, keep_patterns=["*.kv_b_proj"])
    assert plan.audit(plan.engine_tensors()) == []
    assert time.process_time() - began < 10  # 2 s; the margin is for slow machines


def test_only_the_score_correction_of_a_router_is_fp32_in_the_engine():
    plan = QuantPlan.from_hf_config(TINY["deepseek-v3"])
    fp32 = [e.name for e in plan.entries if e.dtype == torch.float32]
    assert fp32 == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
    assert plan.entry(fp32[0]).reason == "never quantized: router"


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("llama", {"attention_bias": "yes"}, "'attention_bias' must be true, false.*found 'yes'"),
        ("qwen3-moe", {"num_experts": None}, "'num_experts' must be a positive int.*found None"),
        ("mixtral", {"num_local_experts": True}, "'num_local_experts' must be a pos.*found True"),
        ("deepseek-v3", {"kv_lora_rank": 0}, "'kv_lora_rank' must be a positive int.*found 0"),
        ("qwen3", {"architectures": ["GptOssForCausalLM"]}, "not known.*from_tensors plans any"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_by_key(model, change, message):
    with pytest.raises(QuantPlanError, match=message):
        QuantPlan.from_hf_config(TINY[model] | change)


def test_llama_without_head_size_and_key_heads_means_one_for_each_query_head():
    old = {k: v for k, v in TINY["llama"].items() if k != "num_key_value_heads"}
    plan = QuantPlan.from_hf_config(old)
    assert plan.entry("model.layers.0.self_attn.k_proj.weight").shape == (256, 256)
