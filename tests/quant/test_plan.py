"""The plan holds the model's own tensors, tells the engine the same, and refuses what cannot be."""

import pytest
import torch

from fp8rl.quant import QuantPlan, QuantPlanError

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


@pytest.mark.parametrize("tied", [False, True])
def test_entries_are_the_state_dict_of_the_real_model(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(**CONFIG | {"tie_word_embeddings": tied})
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]  # one tensor under two names; a checkpoint holds the first
    found = QuantPlan.from_hf_config(config.to_dict())
    assert [(e.name, e.shape) for e in found.entries] == list(state.items())


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


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, {}, "'MixtralForCausalLM'.*Qwen3ForCausalLM"),
        ({"architectures": None}, {}, "'architectures'.*found None.*Qwen3ForCausalLM"),
        ({"hidden_size": "256"}, {}, "'hidden_size' must be a positive integer, found '256'"),
        ({"head_dim": None}, {}, "'head_dim' must be a positive integer, found None"),
        ({"tie_word_embeddings": 1}, {}, "'tie_word_embeddings' must be true or false, found 1"),
        ({"attention_bias": True}, {}, "attention_bias=true is not supported"),
        ({}, {"weights": "int8"}, "weights must be 'fp8' or 'bf16', found 'int8'"),
        ({}, {"tensor_parallel": 0}, "tensor_parallel must be at least 1, found 0"),
        ({}, {"keep_first_layers": 4}, r"keep_first_layers must be in 0\.\.3 .*found 4"),
        ({}, {"keep_last_layers": -1}, r"keep_last_layers must be in 0\.\.3 .*found -1"),
        ({}, {"keep_patterns": ["*.q_proj.weight"]}, "matches no linear module"),
        ({}, {"keep_patterns": ["lm_head"]}, "matches no linear module"),
    ],
)
def test_bad_requests_are_refused_with_what_was_found(change, options, message):
    with refusal(QuantPlanError, message):
        plan(change, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_first_layers": 1}, {"keep_patterns": ["*.1.self_attn.[qkv]_proj"]}],
)
def test_vllm_reads_the_quantization_config_as_the_plan_means_it(options):
    fp8 = pytest.importorskip("vllm.model_executor.layers.quantization.fp8")
    qwen3 = pytest.importorskip("vllm.model_executor.models.qwen3").Qwen3ForCausalLM
    p = plan(**options)
    config = fp8.Fp8Config.from_config(p.quantization_config())
    config.apply_vllm_mapper(qwen3.hf_to_vllm_mapper)
    assert config.weight_block_size == [128, 128]
    parts = {**qwen3.packed_modules_mapping, "o_proj": ["o_proj"], "down_proj": ["down_proj"]}
    for layer in range(3):
        for module in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ):
            path, _, linear = f"model.layers.{layer}.{module}".rpartition(".")
            skipped = fp8.is_layer_skipped(
                f"{path}.{linear}", config.ignored_layers, qwen3.packed_modules_mapping
            )
            for part in parts[linear]:
                assert skipped != p.is_quantized(f"{path}.{part}.weight")
