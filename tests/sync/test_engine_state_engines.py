"""Whole engines: of two workers, of every architecture, and after loads that broke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sync.test_engine_state import run

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).parents[2]
RESULT = "result: "
LAYER = "model.layers.1"
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
VARIANTS = (
    *FAMILIES,
    *(f"{family}, tied" for family in FAMILIES),
    "llama with biases",
    "qwen3_moe, one layer dense",
    "qwen3_moe, each second dense",
)


def engine(family: str, precision: str, steps: list[Any], ranks: int = 1, **changes: Any) -> Any:
    """Take a real engine through ``steps``; what each gave."""
    job = {"family": family, "precision": precision, "changes": changes, "ranks": ranks}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sync.engine_run_worker", json.dumps(job | {"steps": steps})],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    return json.loads(lines[-1].removeprefix(RESULT))


def test_both_workers_of_an_engine_take_prove_and_mend_their_parts() -> None:
    broken = f"{LAYER}.mlp.experts.2.up_proj.weight"
    tensors, first, once, second, flipped, back, broke, mended, again = engine(
        "qwen3_moe",
        "fp8",
        [
            ["tensors"],
            ["load", 2],
            ["outputs"],
            ["load", 1],
            ["flip", 1],
            ["flip", 1],
            ["break", 3, broken],
            ["load", 2],
            ["outputs"],
        ],
        ranks=2,
        mlp_only_layers=[0],
    )
    assert tensors[0] == tensors[1]
    shapes = {name: shape for name, _, shape in tensors[0]}
    assert shapes[f"{LAYER}.self_attn.k_proj.weight"] == [128, 256]  # one head, held by both
    assert shapes[f"{LAYER}.mlp.experts.3.down_proj.weight"] == [256, 256]  # each holds 128 columns
    assert shapes["lm_head.weight"] == [2100, 256]
    assert first == second == back == mended == [[], []]
    unharmed, harmed = flipped
    assert unharmed == []
    assert len(harmed) == 1
    assert harmed[0].startswith(f"{LAYER}.self_attn.v_proj.weight: 1 of 32768 elements")
    assert broke == [True, True]
    assert again == once


@pytest.mark.parametrize(
    ("family", "precision", "tied", "broken"),
    [
        ("qwen2", "fp8", False, f"{LAYER}.self_attn.k_proj.weight"),
        ("llama", "bf16", True, "model.embed_tokens.weight"),
        ("qwen3_moe", "fp8", False, f"{LAYER}.mlp.experts.3.down_proj.weight"),
        ("mixtral", "bf16", False, f"{LAYER}.block_sparse_moe.experts.0.w3.weight"),
    ],
)
def test_after_a_load_that_broke_outputs_are_those_of_a_fresh_engine(
    family: str, precision: str, tied: bool, broken: str
) -> None:
    steps = [["load", 1], ["outputs"], ["break", 3, broken], ["load", 2], ["outputs"]]
    *_, old, broke, proven, mended = engine(family, precision, steps, tie_word_embeddings=tied)
    fresh = engine(family, precision, [["load", 2], ["outputs"]], tie_word_embeddings=tied)
    assert broke == [True]
    assert proven == [[]]
    assert mended == fresh[-1]
    assert old != mended


def test_every_architecture_is_loaded_in_part_mended_and_proven() -> None:
    cases = [f"{variant}, {precision}" for variant in VARIANTS for precision in ("fp8", "bf16")]
    everything = run("engine_parts_worker", *cases, timeout=500)
    assert len(everything) == 26
    for case, seen in everything.items():
        assert seen["unplanned"] == seen["in no unit or in two"] == [], case
        assert seen["after a load"] == seen["after a load of some"] == [], case
        assert seen["old weights named"] == seen["weights"], case
        assert seen["touched besides"] == [], case
        assert seen["unlike a fresh one"] == [], case


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_on_a_gpu_weights_are_loaded_and_proven_too(family: str, precision: str) -> None:
    steps = [["load", 1], ["outputs"], ["load", 2], ["load", 1], ["outputs"]]
    first, once, second, third, again = engine(family, precision, steps)
    assert first == second == third == [[]]
    assert once == again


@pytest.mark.gpu
def test_on_a_gpu_a_changed_byte_is_named() -> None:
    _, flipped, back = engine("qwen3", "fp8", [["load", 1], ["flip", 0], ["flip", 0]])
    assert len(flipped[0]) == 1
    assert flipped[0][0].startswith(f"{LAYER}.self_attn.v_proj.weight: 1 of ")
    assert back == [[]]
