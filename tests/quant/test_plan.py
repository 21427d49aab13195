"""The plan holds the model's own tensors, tells the engine the same, and refuses what cannot be."""

import pytest
import torch

from fp8rl.quant import QuantPlan, QuantPlanError

from .plan_models import QWEN3_30B_A3B
from .refusal import refusal

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def plan(config: dict | None = None, **options) -> QuantPlan:
    return QuantPlan.from_hf_config(CONFIG | (config or {}), **options)


def kept_linears(p: QuantPlan) -> list[str]:
    return [e.name for e in p.entries if "_proj" in e.name and not e.quantized]


def test_entries_stand_in_the_order_of_the_real_models_state_dict():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG))
    assert [e.name for e in plan().entries] == list(model.state_dict())


def test_linears_of_decoder_layers_are_quantized_and_nothing_else():
    p = plan()
    quantized = [e.name for e in p.entries if e.quantized]
    assert quantized == [f"model.layers.{i}.{m}.weight" for i in range(3) for m in LINEARS]
    reasons = {e.name: e.reason for e in p.entries}
    assert reasons["lm_head.weight"] == "never quantized: head"
    assert reasons["model.embed_tokens.weight"] == "never quantized: embedding"
    assert reasons["model.layers.1.self_attn.q_norm.weight"] == "never quantized: norm"
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "linear weight of a decoder layer"


def test_the_engine_receives_data_and_scales_or_bf16_in_order():
    received = plan().engine_tensors()
    assert received[0] == ("model.embed_tokens.weight", torch.bfloat16, (96, 256))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert received[1] == (name, torch.float8_e4m3fn, (512, 256))
    assert received[2] == (f"{name}_scale_inv", torch.float32, (4, 2))
    assert received[-1] == ("lm_head.weight", torch.bfloat16, (96, 256))
    assert len(received) == len(plan().entries) + 3 * len(LINEARS)


def test_the_engine_is_told_the_exact_modules_to_keep():
    config = plan(keep_first_layers=1, keep_patterns=["*.2.mlp.down_proj"]).quantization_config()
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": [
            *(f"model.layers.0.{m}" for m in LINEARS),
            "model.layers.2.mlp.down_proj",
            "lm_head",
        ],
    }


def test_a_bf16_engine_quantizes_nothing_and_has_no_quantization_config():
    p = plan(weights="bf16")
    assert p.quantization_config() is None
    assert not any(e.quantized for e in p.entries)
    assert {t.dtype for t in p.engine_tensors()} == {torch.bfloat16}
    assert [t.name for t in p.engine_tensors()] == [e.name for e in p.entries]


def test_first_and_last_layers_and_patterns_are_kept_with_their_reason():
    p = plan(keep_first_layers=1, keep_last_layers=1, keep_patterns=["*.1.mlp.*"])
    mlp = [m for m in LINEARS if m.startswith("mlp")]
    assert kept_linears(p) == [
        *(f"model.layers.0.{m}.weight" for m in LINEARS),
        *(f"model.layers.1.{m}.weight" for m in mlp),
        *(f"model.layers.2.{m}.weight" for m in LINEARS),
    ]
    assert p.entry("model.layers.0.mlp.up_proj.weight").reason == "kept: one of the first 1 layers"
    assert p.entry("model.layers.2.mlp.up_proj.weight").reason == "kept: one of the last 1 layers"
    assert "'*.1.mlp.*'" in p.entry("model.layers.1.mlp.up_proj.weight").reason


def test_a_name_the_plan_cannot_place_is_an_error_with_the_nearest_name():
    p = plan()
    assert p.is_quantized("model.layers.2.mlp.up_proj.weight")
    assert not p.is_quantized("model.norm.weight")
    with pytest.raises(QuantPlanError, match=r"nearest known name is 'model\.layers\.2\.mlp\.up_p"):
        p.is_quantized("model.layers.2.mlp.up_proj.wieght")


@pytest.mark.parametrize("pattern", ["*.self_attn.q_proj", "*.self_attn.[kv]_proj", "*.up_proj"])
def test_a_fused_linear_kept_in_part_is_refused(pattern):
    with pytest.raises(QuantPlanError, match=r"layers\.0\.\S*(qkv|gate_up)_proj, so they must"):
        plan(keep_patterns=[pattern])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"hidden_size": 320}, {}, r"layers\.0\.self_attn\.q_proj\.weight \(512, 320\)"),
        ({"num_key_value_heads": 1}, {}, r"layers\.0\.self_attn\.k_proj\.weight \(64, 256\)"),
        ({"intermediate_size": 576}, {}, r"layers\.0\.mlp\.gate_proj\.weight \(576, 256\)"),
        ({}, {"tensor_parallel": 4}, r"k_proj.weight .* a rank holds \(64, 256\)"),
        ({"intermediate_size": 640}, {"tensor_parallel": 2}, r"gate_proj.* holds \(320, 256\)"),
        ({}, {"tensor_parallel": 3}, r"q_proj.* 8 heads or channels"),
        ({"head_dim": 128}, {"tensor_parallel": 16}, r"q_proj.* 8 heads or channels"),
        ({}, {"tensor_parallel": 3, "weights": "bf16"}, r"q_proj.* 8 heads or channels"),
    ],
)
def test_shapes_the_engine_cannot_serve_are_named(change, options, message):
    with pytest.raises(QuantPlanError, match=message):
        plan(change, **options)


def test_shapes_that_fill_whole_blocks_on_every_rank_are_taken():
    assert not kept_linears(plan(tensor_parallel=2))
    copied = plan({"head_dim": 128, "num_key_value_heads": 2}, tensor_parallel=4)  # kv heads
    assert not kept_linears(copied)
    assert len(kept_linears(plan({"intermediate_size": 576}, weights="bf16"))) == 3 * len(LINEARS)
    kept = kept_linears(plan({"intermediate_size": 576}, keep_patterns=["*.mlp.*"]))
    assert len(kept) == 3 * 3 and all(".mlp." in name for name in kept)


def test_unfit_linears_are_kept_by_name_with_all_that_is_fused_with_them():
    p = plan({"num_key_value_heads": 1}, unfit="keep")  # k, v: 64 rows
    qkv = [m for m in LINEARS if m[-6:] in ("q_proj", "k_proj", "v_proj")]
    names = [f"model.layers.{i}.{m}" for i in range(3) for m in qkv]
    assert kept_linears(p) == [f"{name}.weight" for name in names]
    assert p.quantization_config()["modules_to_not_convert"] == [*names, "lm_head"]
    k, q = (p.entry(f"model.layers.1.self_attn.{x}_proj.weight").reason for x in "kq")
    assert k == (
        "kept: with tensor_parallel=1 a rank holds (64, 256), but FP8 needs multiples of (128, 128)"
    )
    assert q.startswith("kept: part of model.layers.1.self_attn.qkv_proj, as is model.layers.1.")


def test_a_refusal_counts_what_else_is_unfit_and_says_what_to_do():
    with pytest.raises(QuantPlanError) as refused:
        plan({"num_key_value_heads": 1}, keep_first_layers=1)
    assert str(refused.value) == (
        "model.layers.1.self_attn.k_proj.weight (64, 256): with tensor_parallel=1 a rank holds "
        "(64, 256), but FP8 needs multiples of (128, 128) (5 more linears cannot be served); "
        "change the model's sizes, use fewer ranks, keep model.layers.1.self_attn.k_proj and the "
        "other parts of model.layers.1.self_attn.qkv_proj in BF16 through keep_patterns, or keep "
        "every linear that does not fit with unfit='keep'"
    )


def test_experts_are_kept_together_under_the_name_of_their_module():
    with pytest.raises(QuantPlanError, match=r"experts\.0\.gate_proj.* a rank holds \(96, 2048\)"):
        QuantPlan.from_hf_config(QWEN3_30B_A3B, tensor_parallel=8)
    p = QuantPlan.from_hf_config(QWEN3_30B_A3B, tensor_parallel=8, unfit="keep")
    assert sum(e.quantized for e in p.entries) == 48 * 4  # attention
    kept = p.quantization_config()["modules_to_not_convert"]
    assert [m for m in kept if "experts" in m] == [
        f"model.layers.{i}.mlp.experts" for i in range(48)
    ]
    with pytest.raises(
        QuantPlanError, match=r"fuses 384 linears into model\.layers\.0\.mlp\.experts"
    ):
        QuantPlan.from_hf_config(QWEN3_30B_A3B, keep_patterns=["*.experts.7.*"])


def test_routers_are_named_to_the_engine():
    kept = QuantPlan.from_hf_config(QWEN3_30B_A3B).quantization_config()["modules_to_not_convert"]
    assert kept == [*(f"model.layers.{i}.mlp.gate" for i in range(48)), "lm_head"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"architectures": ["GptOssForCausalLM"]}, {}, "'GptOssForCausalLM'.*Qwen3ForCausalLM"),
        ({"architectures": None}, {}, "'architectures'.*found None.*Qwen3ForCausalLM"),
        ({"hidden_size": "256"}, {}, "'hidden_size' must be a positive integer, found '256'"),
        ({"head_dim": None}, {}, "'head_dim' must be a positive integer, found None"),
        ({"tie_word_embeddings": 1}, {}, "'tie_word_embeddings' must be true or false, found 1"),
        ({"attention_bias": True}, {}, "attention_bias=true is not supported"),
        ({}, {"weights": "int8"}, "weights must be 'fp8' or 'bf16', found 'int8'"),
        ({}, {"unfit": "drop"}, "unfit must be 'refuse' or 'keep', found 'drop'"),
        ({}, {"tensor_parallel": 0}, "tensor_parallel must be at least 1, found 0"),
        ({}, {"keep_first_layers": 4}, r"keep_first_layers must be in 0\.\.3 .*found 4"),
        ({}, {"keep_last_layers": -1}, r"keep_last_layers must be in 0\.\.3 .*found -1"),
        ({}, {"keep_patterns": ["*.q_proj.weight"]}, "matches no linear module"),
        ({}, {"keep_patterns": ["lm_head"]}, "matches no linear module"),
    ],
)
def test_bad_requests_are_refused_with_what_was_found(change, options, message):
    with refusal(QuantPlanError, message) as found:
        plan(change, **options)
    assert str(found.value)
