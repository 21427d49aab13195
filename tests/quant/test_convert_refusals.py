"""What cannot be converted is refused with one message that names the file or the tensor."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8rl.quant import NonFiniteWeightError, QuantPlanError
from fp8rl.quant import convert as convert_module
from fp8rl.quant import convert_chunk as chunk_module
from fp8rl.quant.convert import convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions
from fp8rl.quant.errors import CheckpointFormatError, CheckpointWriteError, ConversionError

from .checkpoint_files import config_of, file_bytes, load, random_tensors, save

ROOT = Path(__file__).parents[2]
CONFIG = config_of("qwen3", num_hidden_layers=1)
UP = "model.layers.0.mlp.up_proj.weight"
FP8 = ConvertOptions()
BACK = ConvertOptions(to="bf16")


@pytest.fixture
def tensors():
    return random_tensors(CONFIG)


def refused(error, message, tmp_path, tensors, config=CONFIG, options=FP8):
    source = save(tmp_path / "source", config, tensors)
    with pytest.raises(error, match=message) as found:
        convert_checkpoint(source, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    return found.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_non_finite_weight_is_named_with_its_file_and_place(
    value, dtype, tensors, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunk_module, "CHUNK", 2**12)  # the place is that in the tensor
    wide = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    wide[UP][300, 17] = wide[UP][511, 255] = value
    message = (
        rf"source/model\.safetensors: tensor '{UP}': 2 non-finite .* first at index \[300, 17\]"
    )
    options = ConvertOptions(fp32_as="export")
    error = refused(NonFiniteWeightError, message, tmp_path, wide, options=options)
    assert (error.count, error.first_index) == (2, (300, 17))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_non_finite_value_in_a_tensor_that_is_only_copied_is_no_less_an_error(
    name, tensors, tmp_path
):
    tensors[name].view(-1)[5] = float("nan")
    assert refused(NonFiniteWeightError, f"tensor '{name}': 1 non-finite", tmp_path, tensors)


def test_a_non_finite_scale_or_code_is_named(tensors, tmp_path):
    convert_checkpoint(save(tmp_path / "good", CONFIG, tensors), tmp_path / "fp8", FP8)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for number, spoil in enumerate(("scale", "code")):
        fp8 = load(tmp_path / "fp8")
        if spoil == "scale":
            fp8[f"{UP}_scale_inv"][0, 1] = float("inf")
        else:
            fp8[UP].view(torch.uint8)[3, 4] = 0x7F
        message = f"'{UP}' dequantizes to .* non-finite"
        folder = tmp_path / str(number)
        assert refused(CheckpointFormatError, message, folder, fp8, config, BACK)


def test_a_tensor_left_over_missing_or_of_another_shape_is_named(tensors, tmp_path):
    extra = tensors | {"model.layers.0.mlp.extra.weight": torch.ones(2, 2).bfloat16()}
    message = r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.extra\.weight' has no place"
    assert refused(CheckpointFormatError, message, tmp_path / "a", extra)
    missing = {name: tensor for name, tensor in tensors.items() if name != UP}
    assert refused(CheckpointFormatError, f"lacks tensor '{UP}'", tmp_path / "b", missing)
    smaller = tensors | {UP: tensors[UP][:-1].contiguous()}
    message = rf"'{UP}' has shape \(511, 256\), and config\.json describes \(512, 256\)"
    assert refused(CheckpointFormatError, message, tmp_path / "c", smaller)


def test_a_linear_that_is_no_float_is_named(tensors, tmp_path):
    integers = tensors | {UP: tensors[UP].to(torch.int8)}
    assert refused(CheckpointFormatError, f"'{UP}' has dtype torch.int8", tmp_path, integers)


def test_a_tensor_both_stacked_and_by_itself_is_refused(tmp_path):
    config = config_of("qwen3-moe")
    stack = {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 256, 128).bfloat16()}
    message = "'model.layers.0.mlp.experts.0.down_proj.weight' a second time"
    both = random_tensors(config) | stack
    assert refused(CheckpointFormatError, message, tmp_path, both, config)


def test_fp32_linears_ask_for_a_choice(tensors, tmp_path):
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    message = r"is fp32, as 7 of the 7 tensors.*--fp32-as master .* or --fp32-as export"
    assert refused(ConversionError, message, tmp_path, wide)


def test_what_is_quantized_is_not_quantized_again_and_what_is_not_has_no_way_back(
    tensors, tmp_path
):
    convert_checkpoint(save(tmp_path / "good", CONFIG, tensors), tmp_path / "fp8", FP8)
    with pytest.raises(ConversionError, match="is quantized already"):
        convert_checkpoint(tmp_path / "fp8", tmp_path / "out", FP8)
    with pytest.raises(ConversionError, match="is no blockwise FP8 checkpoint"):
        convert_checkpoint(tmp_path / "good", tmp_path / "out", BACK)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "awq"},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"activation_scheme": "static"},
        {"fmt": "e5m2"},
    ],
)
def test_other_kinds_of_quantization_have_no_way_back(change, tensors, tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]} | change
    config = CONFIG | {"quantization_config": fp8}
    assert refused(ConversionError, "is no blockwise FP8", tmp_path, tensors, config, BACK)


def test_an_fp8_tensor_without_its_scale_and_a_scale_without_its_tensor_are_named(
    tensors, tmp_path
):
    convert_checkpoint(save(tmp_path / "good", CONFIG, tensors), tmp_path / "fp8", FP8)
    fp8, scale = load(tmp_path / "fp8"), f"{UP}_scale_inv"
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for number, (change, message) in enumerate(
        (
            ({scale: None}, f"'{UP}' is E4M3 and has no '{scale}'"),
            ({UP: None}, f"'{scale}' .* is neither an E4M3 weight nor the _scale_inv of one"),
            ({UP: fp8[UP].float().to(torch.float8_e5m2)}, f"'{UP}' .* is neither"),
            ({scale: fp8[scale][:1].clone()}, rf"'{scale}' is torch.float32 \(1, 2\), expected"),
        )
    ):
        changed = {n: t for n, t in (fp8 | change).items() if t is not None}
        assert refused(
            CheckpointFormatError, message, tmp_path / str(number), changed, config, BACK
        )


def test_options_that_say_how_to_quantize_do_not_go_with_the_way_back(tensors, tmp_path):
    for options in ({"report": True}, {"fp32_as": "master"}, {"keep_first_layers": 1}):
        message = f"{next(iter(options))} says how to quantize"
        chosen = ConvertOptions(to="bf16", **options)
        folder = tmp_path / next(iter(options))
        assert refused(ConversionError, message, folder, tensors, options=chosen)


def test_shapes_that_an_engine_cannot_serve_are_refused_or_kept(tmp_path):
    config = config_of("qwen3", num_hidden_layers=1, intermediate_size=320)
    source = save(tmp_path / "source", config, random_tensors(config))
    with pytest.raises(QuantPlanError, match=r"mlp\.\w+_proj"):
        convert_checkpoint(source, tmp_path / "out", FP8)
    convert_checkpoint(source, tmp_path / "out", ConvertOptions(unfit="keep"))
    assert load(tmp_path / "out")[UP].dtype == torch.bfloat16


def test_a_truncated_shard_is_named_before_anything_is_made(tensors, tmp_path):
    source = save(tmp_path / "source", CONFIG, tensors, shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointFormatError, match=f"{shard}: is truncated"):
        convert_checkpoint(source, tmp_path / "out", FP8)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_source_that_changes_while_it_is_read_is_named(tensors, tmp_path):
    source = save(tmp_path / "source", CONFIG, tensors)

    def touch(progress):
        os.utime(source / "model.safetensors", ns=(0, 0))

    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: has changed while"):
        convert_checkpoint(source, tmp_path / "out", FP8, on_progress=touch)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_only_on_demand(tensors, tmp_path):
    source = save(tmp_path / "source", CONFIG, tensors)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ConversionError, match=r"out: is there already; .*--force"):
        convert_checkpoint(source, out, FP8)
    assert file_bytes(out) == {"mine": b"precious"}
    convert_checkpoint(source, out, FP8, force=True)
    assert not (out / "mine").exists()
    (tmp_path / "empty").mkdir()  # nothing is lost in an empty folder
    convert_checkpoint(source, tmp_path / "empty", FP8)
    assert file_bytes(tmp_path / "empty") == file_bytes(out)


def test_a_file_at_the_destination_is_no_empty_folder(tensors, tmp_path):
    source = save(tmp_path / "source", CONFIG, tensors)
    (tmp_path / "out").write_text("")
    with pytest.raises(ConversionError, match="is there already"):
        convert_checkpoint(source, tmp_path / "out", FP8)


@pytest.mark.parametrize("out", ["source", "source/fp8", "."])
def test_source_and_destination_are_apart(out, tensors, tmp_path):
    source = save(tmp_path / "source", CONFIG, tensors)
    before = file_bytes(source)
    with pytest.raises(ConversionError, match="neither inside the other"):
        convert_checkpoint(source, tmp_path / out, FP8, force=True)
    assert file_bytes(source) == before


def test_too_little_room_is_said_before_a_weight_is_written(tensors, tmp_path, monkeypatch):
    source = save(tmp_path / "source", CONFIG, tensors)
    usage = convert_module.shutil.disk_usage(tmp_path)
    little = usage._replace(free=100_000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: little)
    with pytest.raises(ConversionError, match=r"not enough room: 1 MiB .* and 0 MiB are free"):
        convert_checkpoint(source, tmp_path / "out", FP8)
    monkeypatch.undo()
    convert_checkpoint(source, tmp_path / "out", FP8)


def test_a_disk_that_fails_in_the_middle_is_named_and_what_is_done_is_kept(tensors, tmp_path):
    """The system refuses to let a file grow beyond a limit, as a full disk or a quota would."""
    source = save(tmp_path / "source", CONFIG, tensors, shards=2)
    sizes = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    code = (
        "import sys; from pathlib import Path; from fp8rl.quant.convert import convert_checkpoint; "
        "from fp8rl.quant.convert_plan import ConvertOptions; "
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions())"
    )
    limit = sizes[0] // 2 + 2000
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert CheckpointWriteError.__name__ in done.stderr
    assert "safetensors: cannot be written: File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", FP8)
    assert len(load(tmp_path / "out")) > 0
