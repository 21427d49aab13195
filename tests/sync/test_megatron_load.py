"""A Hugging Face checkpoint into Megatron's model: all that fits, and nothing that does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.quant import CheckpointFormatError
from fp8rl.sync import MegatronSource, SourceError, load_hf_checkpoint
from fp8rl.sync.megatron_layout import global_parameters
from tests.sync.megatron_models import (
    CONFIGS,
    VOCAB,
    alone,
    checkpoint,
    gpt_chunks,
)
from tests.sync.megatron_settings import Layout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG = CONFIGS["qwen3-moe"]
Tensors = dict[str, Tensor]
Q, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with alone():
        yield


def exported(chunks: list[Any], config: dict[str, Any] = CONFIG) -> Tensors:
    return {name: tensor.clone() for name, tensor in MegatronSource(chunks, config)}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def in_two_files(folder: Path, tensors: Tensors) -> None:
    """As large checkpoints are saved: an index, and tensors in any order."""
    halves = [dict(sorted(tensors.items())[half::2]) for half in (0, 1)]
    files = [f"model-0000{half + 1}-of-00002.safetensors" for half in (0, 1)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file, {"format": "pt"})
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.mark.parametrize("experts", ["sequential", "grouped", "stacked"])
def test_a_folder_of_safetensors_is_loaded(experts: str, tmp_path: Path) -> None:
    given = checkpoint(CONFIG)
    in_two_files(tmp_path, given)
    chunks = gpt_chunks(CONFIG, Layout(experts=experts))
    load_hf_checkpoint(chunks, CONFIG, tmp_path)
    assert_equal(exported(chunks), given)


def test_an_fp32_checkpoint_is_rounded_to_the_models_dtype() -> None:
    given = {name: tensor.float() * 1.001 for name, tensor in checkpoint(CONFIG).items()}
    chunks = gpt_chunks(CONFIG)
    load_hf_checkpoint(chunks, CONFIG, given)
    assert_equal(exported(chunks), {name: tensor.bfloat16() for name, tensor in given.items()})


def test_rows_that_pad_the_vocabulary_become_zero() -> None:
    chunks = gpt_chunks(CONFIG)
    load_hf_checkpoint(chunks, CONFIG, checkpoint(CONFIG))
    parameters = global_parameters(chunks)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = parameters[name].detach()
        assert len(rows) == 128 and int(rows[VOCAB:].count_nonzero()) == 0
        assert bool(rows[:VOCAB].any(1).all())


def test_an_expert_bias_stays_fp32_where_the_model_was_cast_to_bf16() -> None:
    config = CONFIGS["deepseek-v3"]
    given = checkpoint(config)
    chunks = gpt_chunks(config)
    router = chunks[0].decoder.layers[1].mlp.router
    assert router.expert_bias.dtype == torch.bfloat16  # as Float16Module leaves it
    load_hf_checkpoint(chunks, config, given)
    assert router.expert_bias.dtype == torch.float32
    assert_equal(exported(chunks, config), given)


def test_a_head_stored_beside_tied_embeddings_is_passed_over() -> None:
    config = CONFIGS["qwen2"]
    given = checkpoint(config)
    chunks = gpt_chunks(config)
    load_hf_checkpoint(chunks, config, given | {"lm_head.weight": torch.zeros(1)})
    assert_equal(exported(chunks, config), given)


def changed(**changes: Tensor | None) -> Tensors:
    found: dict[str, Any] = checkpoint(CONFIG) | changes
    return {name: tensor for name, tensor in found.items() if tensor is not None}


WRONG: dict[str, tuple[Callable[[], Tensors], str]] = {
    "missing": (lambda: changed(**{EXPERT: None}), rf"lacks {EXPERT},"),
    "extra": (lambda: changed(**{"model.vision.weight": torch.zeros(2)}), r"holds model\.vision"),
    "misshapen": (
        lambda: changed(**{Q: torch.zeros(256, 128)}),
        rf"{Q} is torch.float32 \[256, 128\], expected \[256, 256\]",
    ),
    "quantized": (
        lambda: changed(**{EXPERT: torch.zeros(128, 256, dtype=torch.float8_e4m3fn)}),
        rf"{EXPERT} is torch.float8_e4m3fn \[128, 256\], expected .* in torch.bfloat16",
    ),
    "another family's": (lambda: checkpoint(CONFIGS["mixtral"]), r"lacks .* and \d+ more, which"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tensor_is_named_and_nothing_is_written(wrong: str) -> None:
    make, message = WRONG[wrong]
    chunks = gpt_chunks(CONFIG)
    before = exported(chunks)
    with pytest.raises(SourceError, match=message):
        load_hf_checkpoint(chunks, CONFIG, make())
    assert_equal(exported(chunks), before)


def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    in_two_files(tmp_path, checkpoint(CONFIG))
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    chunks = gpt_chunks(CONFIG)
    before = exported(chunks)
    with pytest.raises(CheckpointFormatError, match=r"00002-of-00002\.safetensors: .*truncated"):
        load_hf_checkpoint(chunks, CONFIG, tmp_path)
    assert_equal(exported(chunks), before)


def test_the_models_own_misfit_is_named_and_nothing_is_written() -> None:
    narrower = CONFIG | {"moe_intermediate_size": 256}
    chunks = gpt_chunks(CONFIG)
    before = exported(chunks)
    with pytest.raises(SourceError, match=r"experts\.0\.linear_fc1\.weight' is \[256, 256\]"):
        load_hf_checkpoint(chunks, narrower, checkpoint(narrower))
    assert_equal(exported(chunks), before)
