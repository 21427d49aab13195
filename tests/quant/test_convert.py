"""What a converted checkpoint holds: the plan's tensors, to the byte, and back."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    QuantizedTensor,
    QuantPlan,
    dequantize_blockwise,
    measure_error,
    quantize_blockwise,
)
from fp8rl.quant import convert_chunk as chunk_module
from fp8rl.quant.convert import convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions

from .checkpoint_files import config_in, config_of, file_bytes, load, random_tensors, same, save
from .plan_models import TINY

BACK = ConvertOptions(to="bf16")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model", TINY)
def test_it_holds_the_tensors_of_the_plan_bit_for_bit(model, shards, tmp_path):
    config = config_of(model)
    tensors = random_tensors(config)
    source = save(tmp_path / "source", config, tensors, shards)
    result = convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    plan = QuantPlan.from_hf_config(config)

    found = load(tmp_path / "fp8")
    assert {(n, t.dtype, tuple(t.shape)) for n, t in found.items()} == set(plan.engine_tensors())
    for entry in plan.entries:
        if entry.quantized:
            q = quantize_blockwise(tensors[entry.name])
            assert same(found[entry.name], q.data)
            assert same(found[f"{entry.name}_scale_inv"], q.scale_inv)
        else:
            assert same(found[entry.name], tensors[entry.name])
    quantization = plan.quantization_config()
    assert config_in(tmp_path / "fp8") == config | {"quantization_config": quantization}
    assert result.converted_tensors == sum(entry.quantized for entry in plan.entries)
    assert not (tmp_path / "fp8.partial").exists()


@pytest.mark.parametrize("model", ["qwen3", "qwen3-moe"])
def test_back_gives_the_dequantized_values_and_the_config_of_before(model, tmp_path):
    config = config_of(model)
    tensors = random_tensors(config)
    source = save(tmp_path / "source", config, tensors, shards=2)
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", BACK)
    assert config_in(tmp_path / "back") == config
    back = load(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for entry in QuantPlan.from_hf_config(config).entries:
        x = tensors[entry.name]
        expected = dequantize_blockwise(quantize_blockwise(x)) if entry.quantized else x
        assert same(back[entry.name], expected)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_fp8_to_bf16_to_fp8_changes_no_value_and_only_the_blocks_of_224(seed, tmp_path_factory):
    """Such a block fits at half the scale too, where the same values have other codes."""
    folder = tmp_path_factory.mktemp("round")
    config = config_of("qwen3", num_hidden_layers=1, vocab_size=8)
    tensors = random_tensors(config, seed=seed)
    row = "model.layers.0.mlp.up_proj.weight"
    tensors[row][0, 0], tensors[row][0, 1:] = 228.0, 1.0  # rounds to 224 at scale 1
    save(folder / "source", config, tensors)
    convert_checkpoint(folder / "source", folder / "once", ConvertOptions())
    convert_checkpoint(folder / "once", folder / "back", BACK)
    convert_checkpoint(folder / "back", folder / "twice", ConvertOptions())
    once, twice = load(folder / "once"), load(folder / "twice")
    assert once.keys() == twice.keys()
    changed = 0
    for name, before in once.items():
        if f"{name}_scale_inv" not in once:
            continue
        a = QuantizedTensor(before, once[f"{name}_scale_inv"], (128, 128), "pow2")
        b = QuantizedTensor(twice[name], twice[f"{name}_scale_inv"], (128, 128), "pow2")
        assert torch.equal(dequantize_blockwise(a), dequantize_blockwise(b))
        blocks = before.float().abs().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        of_224 = blocks.amax(dim=(1, 3)) == 224
        assert torch.equal(b.scale_inv, torch.where(of_224, a.scale_inv / 2, a.scale_inv))
        other = ~of_224.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(a.data.view(torch.uint8)[other], b.data.view(torch.uint8)[other])
        changed += int(of_224.sum())
    assert changed >= 1


@pytest.mark.parametrize("size", [2**10, 100_000])
def test_the_size_of_a_chunk_changes_nothing(size, tmp_path, monkeypatch):
    config = config_of("deepseek-v3")
    source = save(tmp_path / "source", config, random_tensors(config), shards=2)
    options = ConvertOptions(report=True)
    whole = convert_checkpoint(source, tmp_path / "whole", options)
    convert_checkpoint(tmp_path / "whole", tmp_path / "whole-back", BACK)
    monkeypatch.setattr(chunk_module, "CHUNK", size)
    small = convert_checkpoint(source, tmp_path / "small", options)
    convert_checkpoint(tmp_path / "whole", tmp_path / "small-back", BACK)
    assert file_bytes(tmp_path / "whole") == file_bytes(tmp_path / "small")
    assert file_bytes(tmp_path / "whole-back") == file_bytes(tmp_path / "small-back")
    for a, b in zip(whole.errors, small.errors, strict=True):
        assert a.name == b.name
        assert a.relative_rms == pytest.approx(b.relative_rms, rel=1e-12)


@pytest.mark.parametrize("model", ["qwen3-moe", "mixtral", "deepseek-v3"])
def test_stacked_experts_of_transformers_give_the_same_as_single_ones(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**TINY[model])
    network = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    network.save_pretrained(tmp_path / "single")
    network.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(t.ndim == 3 for t in load(tmp_path / "stacked").values())
    assert not any(t.ndim == 3 for t in load(tmp_path / "single").values())
    for form in ("single", "stacked"):
        convert_checkpoint(tmp_path / form, tmp_path / f"{form}-fp8", ConvertOptions())
    single, stacked = load(tmp_path / "single-fp8"), load(tmp_path / "stacked-fp8")
    assert single.keys() == stacked.keys()
    assert all(same(tensor, stacked[name]) for name, tensor in single.items())


def test_a_tied_head_may_be_there_or_not(tmp_path):
    config = config_of("qwen3")
    tensors = random_tensors(config)
    assert config["tie_word_embeddings"] and "lm_head.weight" not in tensors
    convert_checkpoint(save(tmp_path / "a", config, tensors), tmp_path / "a8", ConvertOptions())
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    convert_checkpoint(
        save(tmp_path / "b", config, tensors | head), tmp_path / "b8", ConvertOptions()
    )
    without, with_head = load(tmp_path / "a8"), load(tmp_path / "b8")
    assert with_head.keys() - without.keys() == {"lm_head.weight"}
    assert same(with_head["lm_head.weight"], head["lm_head.weight"])


def test_layers_that_predict_further_tokens_stay_as_they_are(tmp_path):
    config = config_of("deepseek-v3", num_nextn_predict_layers=1)
    tensors = random_tensors(config)
    extra = {"model.layers.3.eh_proj.weight": torch.randn(256, 512).bfloat16()}
    source = save(tmp_path / "source", config, tensors | extra)
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    [(name, tensor)] = extra.items()
    assert same(load(tmp_path / "fp8")[name], tensor)


def test_fp32_masters_and_their_bf16_export_are_told_apart(tmp_path):
    config = config_of("deepseek-v3", torch_dtype="float32")
    tensors = random_tensors(config, torch.float32)
    source = save(tmp_path / "fp32", config, tensors)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    exported = {n: t if n.endswith("bias") else t.bfloat16() for n, t in tensors.items()}
    bf16 = save(tmp_path / "bf16", config | {"torch_dtype": "bfloat16"}, exported)
    for name, fp32_as in (("master", "master"), ("export", "export")):
        convert_checkpoint(source, tmp_path / name, ConvertOptions(fp32_as=fp32_as))
    convert_checkpoint(bf16, tmp_path / "bf16-fp8", ConvertOptions())

    assert file_bytes(tmp_path / "export") == file_bytes(tmp_path / "bf16-fp8")
    assert load(tmp_path / "export")[bias].dtype == torch.float32
    master, export, differ = load(tmp_path / "master"), load(tmp_path / "export"), 0
    for entry in QuantPlan.from_hf_config(config).entries:
        if entry.quantized:
            q = quantize_blockwise(tensors[entry.name], fp32_as="master")
            assert same(master[entry.name], q.data)
            differ += not same(master[entry.name], export[entry.name])
    assert differ > 0


def test_fp16_linears_are_quantized_from_their_values(tmp_path):
    config = config_of("llama", torch_dtype="float16")
    tensors = random_tensors(config, torch.float16)
    source = save(tmp_path / "source", config, tensors)
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    name = "model.layers.0.mlp.up_proj.weight"
    assert same(load(tmp_path / "fp8")[name], quantize_blockwise(tensors[name]).data)
    assert config_in(tmp_path / "fp8")["torch_dtype"] == "float16"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_back_takes_foreign_checkpoints(scale_dtype, tmp_path):
    """Other blocks, scales that lie in another file or are E8M0, experts that are stacked."""
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj")
    weights = [torch.randn(96, 130) * 3, torch.randn(4, 64, 130)]
    quantized = [quantize_blockwise(w, block_size=(32, 64), fp32_as="master") for w in weights]
    tensors = {name: q.data for name, q in zip(names, quantized, strict=True)}
    tensors |= {
        f"{name}_scale_inv": q.scale_inv.to(scale_dtype)
        for name, q in zip(names, quantized, strict=True)
    }
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}
    source = save(tmp_path / "fp8", {"quantization_config": fp8, "a": 1}, tensors, shards=2)
    convert_checkpoint(source, tmp_path / "back", BACK)
    back = load(tmp_path / "back")
    assert back.keys() == set(names)
    for name, q in zip(names, quantized, strict=True):
        assert same(back[name], dequantize_blockwise(q))
    assert config_in(tmp_path / "back") == {"a": 1, "dtype": "bfloat16"}


def test_an_unknown_architecture_is_converted_by_rule(tmp_path):
    config = config_of("llama") | {"architectures": ["NovelForCausalLM"], "model_type": "novel"}
    tensors = random_tensors(config_of("llama"))
    source = save(tmp_path / "source", config, tensors)
    result = convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    assert result.choice.by_rule
    found = load(tmp_path / "fp8")
    for entry in QuantPlan.from_hf_config(config_of("llama")).entries:
        assert (found[entry.name].dtype == torch.float8_e4m3fn) == entry.quantized


def test_what_is_to_be_kept_is_kept_and_named_in_the_config(tmp_path):
    config = config_of("qwen3-moe")
    source = save(tmp_path / "source", config, random_tensors(config))
    choices = {"keep_first_layers": 1, "keep_patterns": ("*.mlp.down_proj",)}
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions(**choices))
    plan = QuantPlan.from_hf_config(config, **choices)
    found = {(n, t.dtype, tuple(t.shape)) for n, t in load(tmp_path / "fp8").items()}
    assert found == set(plan.engine_tensors())
    assert config_in(tmp_path / "fp8")["quantization_config"] == plan.quantization_config()


def test_the_reported_errors_are_those_of_the_tensors_worst_first(tmp_path):
    config = config_of("qwen3")
    tensors = random_tensors(config)
    zero = "model.layers.1.mlp.down_proj.weight"
    tensors[zero][:128, :256] = 0.0
    tensors[zero][130, 0] = 448.0
    source = save(tmp_path / "source", config, tensors)
    errors = convert_checkpoint(source, tmp_path / "fp8", ConvertOptions(report=True)).errors
    names = {e.name for e in QuantPlan.from_hf_config(config).entries if e.quantized}
    assert {error.name for error in errors} == names
    assert [e.relative_rms for e in errors] == sorted(
        (e.relative_rms for e in errors), reverse=True
    )
    for error in errors:
        q = quantize_blockwise(tensors[error.name])
        expected = measure_error(tensors[error.name], dequantize_blockwise(q, torch.float32))
        assert error.relative_rms == pytest.approx(expected.relative_rms, rel=1e-9)
        assert error.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-9)
        largest = q.data.float().abs() == 448
        assert error.saturated == pytest.approx(float(largest.double().mean()), rel=1e-12)
        assert error.blocks == q.scale_inv.numel()
        assert error.zero_blocks == (2 if error.name == zero else 0)


def test_a_tensor_without_error_has_none(tmp_path):
    config = config_of("qwen3")
    tensors = {n: torch.ones_like(t) for n, t in random_tensors(config).items()}
    source = save(tmp_path / "source", config, tensors)
    errors = convert_checkpoint(source, tmp_path / "fp8", ConvertOptions(report=True)).errors
    assert {(e.relative_rms, e.sqnr_db) for e in errors} == {(0.0, math.inf)}


def test_other_files_come_along_and_weights_in_other_formats_do_not(tmp_path):
    config = config_of("qwen3")
    source = save(tmp_path / "source", config, random_tensors(config))
    (source / "additional_chat_templates").mkdir()
    (source / ".cache").mkdir()
    (source / "quantization_report").mkdir()
    kept = {"LICENSE": "free", "additional_chat_templates/tool.jinja": "{{ x }}"}
    left = ("pytorch_model.bin", "consolidated.00.pth", ".cache/x", "quantization_report/a.csv")
    for name, text in {**kept, **dict.fromkeys(left, "no")}.items():
        (source / name).write_text(text)
    (source / "vocab.json").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (tmp_path / "blob").write_text("blob")
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    found = file_bytes(tmp_path / "fp8")
    expected = {"config.json", "model.safetensors", "tokenizer.json", "vocab.json", *kept}
    assert found.keys() == expected
    assert found["vocab.json"] == b"blob"
    assert not (tmp_path / "fp8" / "vocab.json").is_symlink()


def test_progress_goes_from_nothing_to_all(tmp_path):
    config = config_of("qwen3")
    source = save(tmp_path / "source", config, random_tensors(config), shards=2)
    seen = []
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions(), on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done[0] == 0
    assert done == sorted(done)
    assert done[-1] == seen[-1].total == sum(t.nbytes for t in load(source).values())


def test_the_folder_is_complete_before_it_is_placed(tmp_path):
    config = config_of("qwen3")
    source = save(tmp_path / "source", config, random_tensors(config), shards=2)
    seen = {}

    def look(folder, result):
        assert not (tmp_path / "fp8").exists()
        assert result.destination == tmp_path / "fp8"
        seen.update(file_bytes(folder))

    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions(), before_placing=look)
    assert seen == file_bytes(tmp_path / "fp8")
    index = json.loads(seen["model.safetensors.index.json"])
    tensors = load(tmp_path / "fp8")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
