"""Every family through the table, on one rank: its Hugging Face model is the same function.

A checkpoint is loaded into Megatron's model and exported from it. The export must be the checkpoint
bit for bit, a whole checkpoint for transformers, and a model of the same logits. These are computed
in fp32 from the BF16 weights: bounds of BF16 would hide a norm in the place of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8rl.quant import QuantPlan
from fp8rl.quant.architectures_table import ARCHITECTURES
from fp8rl.sync import MegatronSource, SourceError, load_hf_checkpoint, megatron_layout
from fp8rl.sync.megatron_split import COLUMNS, ROWS, WHOLE, Run, Split
from fp8rl.sync.megatron_table import LAYER, OUTSIDE, Rule
from tests.sync.megatron_models import (
    CONFIGS,
    MOE,
    alone,
    checkpoint,
    gpt_chunks,
    hugging_face,
    logits,
    tokens,
)
from tests.sync.megatron_settings import Layout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SAME_FUNCTION = 1e-5  # relative, in fp32; 0 found for dense models, 1.5e-6 for experts
LAYOUTS = {
    "local": Layout(),
    "Transformer Engine's names": Layout(fused=True, experts="grouped"),
    "stacked experts": Layout(experts="stacked"),
}
CASES = [(family, name) for name in LAYOUTS for family in (MOE if "stacked" in name else CONFIGS)]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with alone():
        yield


def exported(chunks: list[Any], family: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in MegatronSource(chunks, CONFIGS[family])}


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def hugging_face_logits(family: str, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = hugging_face(CONFIGS[family], tensors, folder)(tokens()).logits
    return found


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_export_is_a_checkpoint_of_the_same_function(
    family: str, layout: str, tmp_path: Path
) -> None:
    config, given = CONFIGS[family], checkpoint(CONFIGS[family])
    chunks = gpt_chunks(config, LAYOUTS[layout])
    load_hf_checkpoint(chunks, config, given)
    found = exported(chunks, family)
    ours = logits(chunks)
    assert list(found) == list(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in given.items()}
    assert ours is not None
    assert apart(ours, hugging_face_logits(family, found, tmp_path)) < SAME_FUNCTION


@pytest.mark.parametrize("family", CONFIGS)
def test_the_plan_and_the_source_name_the_same_tensors(family: str) -> None:
    plan = QuantPlan.from_hf_config(CONFIGS[family], unfit="keep")
    source = MegatronSource(gpt_chunks(CONFIGS[family]), CONFIGS[family])
    assert [(m.name, m.shape) for m in source.metadata()] == [
        (entry.name, entry.shape) for entry in plan.entries
    ]


def swapped(*leaves: str) -> dict[str, str]:
    return dict(zip(leaves, reversed(leaves), strict=True))


def renamed(rules: tuple[Rule, ...], names: dict[str, str]) -> tuple[Rule, ...]:
    """Rules whose tensors are those of other rules."""
    return tuple(
        replace(rule, hf=tuple(".".join(names.get(x, x) for x in n.split(".")) for n in rule.hf))
        for rule in rules
    )


def cut_otherwise(
    table: Mapping[str, tuple[Rule, ...]], megatron: str, split: Split
) -> dict[str, tuple[Rule, ...]]:
    return {
        name: tuple(replace(r, split=split) if r.megatron == megatron else r for r in rules)
        for name, rules in table.items()
    }


RENAMED = {
    "gate and up": ("llama", swapped("gate_proj", "up_proj")),
    "k and v": ("qwen2", swapped("k_proj", "v_proj")),
    "norms of a layer": ("llama", swapped("input_layernorm", "post_attention_layernorm")),
    "norms of q and k": ("qwen3", swapped("q_norm", "k_norm")),
    "gate and up of experts": ("mixtral", swapped("w1", "w3")),
}


@pytest.mark.parametrize("mistake", RENAMED)
def test_a_table_that_swaps_two_tensors_gives_another_function(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, names = RENAMED[mistake]
    config, given = CONFIGS[family], checkpoint(CONFIGS[family])
    chunks = gpt_chunks(config)
    load_hf_checkpoint(chunks, config, given)
    rules = {name: renamed(rules, names) for name, rules in LAYER.items()}
    monkeypatch.setattr(megatron_layout, "LAYER", rules)
    found = exported(chunks, family)
    ours = logits(chunks)
    assert any(not torch.equal(found[name], given[name]) for name in given)
    assert ours is not None
    assert apart(ours, hugging_face_logits(family, found, tmp_path)) > 1000 * SAME_FUNCTION


def test_a_table_without_the_turns_of_q_k_and_v_gives_another_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, given = CONFIGS["qwen3"], checkpoint(CONFIGS["qwen3"])
    chunks = gpt_chunks(config)
    load_hf_checkpoint(chunks, config, given)
    one_after_another = Split(
        0, lambda lengths, ranks, head: [Run(i, 0, size) for i, size in enumerate(lengths)]
    )
    rules = cut_otherwise(LAYER, "self_attention.linear_qkv.weight", one_after_another)
    monkeypatch.setattr(megatron_layout, "LAYER", rules)
    found = exported(chunks, "qwen3")
    ours = logits(chunks)
    assert ours is not None
    assert apart(ours, hugging_face_logits("qwen3", found, tmp_path)) > 1000 * SAME_FUNCTION


@pytest.mark.parametrize(
    ("megatron", "split"),
    [
        ("mlp.linear_fc1.weight", ROWS),
        ("self_attention.linear_qkv.weight", WHOLE),
        ("mlp.linear_fc2.weight", replace(COLUMNS, order=lambda lengths, ranks, head: [])),
    ],
)
def test_a_table_that_loses_a_part_is_refused(
    megatron: str, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_layout, "LAYER", cut_otherwise(LAYER, megatron, split))
    with pytest.raises(SourceError, match=f"{megatron}.*no part of"):
        MegatronSource(gpt_chunks(CONFIGS["llama"]), CONFIGS["llama"])


def test_the_table_has_every_architecture_of_the_plan() -> None:
    assert LAYER.keys() == ARCHITECTURES.keys()
    assert {config["architectures"][0] for config in CONFIGS.values()} == LAYER.keys()


def test_no_two_rows_of_the_table_are_of_one_parameter() -> None:
    for rules in (*LAYER.values(), OUTSIDE):
        patterns = [rule.megatron for rule in rules]
        assert len(set(patterns)) == len(patterns)
        for rule in rules:
            example = rule.megatron.replace("*", "1")
            matching = [other.megatron for other in rules if other.pattern.fullmatch(example)]
            assert matching == [rule.megatron]
