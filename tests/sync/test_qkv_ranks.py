"""Over real Gloo ranks, in every layout of a trainer, each rank gets the scales of one process.

Four ranks run the same GPTModel on the same rows nine times, cut in other ways (`qkv_ranks.py`).
Where a cut leaves the arithmetic alone (data, pipeline, context parallel), all that was observed is
equal bit for bit; tensor parallel sums in another order, so magnitudes differ by rounding.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.quant import KVCalibrator, KVObservation, KVScaleRule, KVScales
from tests.sync.qkv_ranks import KILLED, LAYOUTS, RANKS, REAL

pytestmark = pytest.mark.slow

ROUNDING = 2.0**-6  # a few of bf16
DEADLINE = 20.0  # seconds from the death of a rank to the error on the others
SAME_ARITHMETIC = [name for name in LAYOUTS if "tp" not in name] + ["dp4, two without rows"]
OTHER_SUMS = [name for name in LAYOUTS if "tp" in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks wrote, started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sync.qkv_ranks", str(folder)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def alone(ranks: list[dict[str, Any]], name: str) -> KVObservation:
    """What one process saw of all rows."""
    return KVObservation.from_json(ranks[0]["one, packed" if "packed" in name else "one"])


def scales(found: KVObservation) -> KVScales:
    return KVCalibrator(KVScaleRule(), found.shape).scales(found, version=3)


@pytest.mark.parametrize("name", [*LAYOUTS, "dp4, two without rows"])
def test_every_rank_ends_with_the_same(ranks: list[dict[str, Any]], name: str) -> None:
    assert all(rank[name] == ranks[0][name] for rank in ranks)


@pytest.mark.parametrize("name", SAME_ARITHMETIC)
def test_it_is_what_one_process_observes_bit_for_bit(
    ranks: list[dict[str, Any]], name: str
) -> None:
    found = KVObservation.from_json(ranks[0][name])
    assert ranks[0][name] == alone(ranks, name).to_json()
    assert scales(found) == scales(alone(ranks, name))
    assert found.tokens == int(REAL.sum())


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_with_tensor_parallel_the_scales_are_those_of_one_process(
    ranks: list[dict[str, Any]], name: str
) -> None:
    found, want = KVObservation.from_json(ranks[0][name]), alone(ranks, name)
    assert found.tokens == want.tokens
    assert torch.equal(scales(found).scales(), scales(want).scales())
    assert torch.allclose(found.amax(), want.amax(), rtol=ROUNDING)
    for layer in range(found.shape.layers):
        for x in "qkv":
            heads = [torch.tensor(one.head_amax(layer, x)) for one in (found, want)]
            assert torch.allclose(*heads, rtol=ROUNDING), (layer, x)


def test_layers_differ_so_that_none_can_stand_for_another(ranks: list[dict[str, Any]]) -> None:
    amax = alone(ranks, "one").amax()
    apart = [(amax[i] / amax[j] - 1).abs().max() for i in range(4) for j in range(i)]
    assert min(apart) > 2 * ROUNDING


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("a layer left out", r"KVScaleError: layers \[2\] of 4 .* layer 2: q saw \d+ of 57 tokens"),
        ("nan", "NonFiniteKVError: NaN or Inf .* layer 1 k head 0"),
        ("another shape", r"ShardError: .*layers=4, .* rank 2 has .*layers=5, "),
        ("another kind", "ShardError: .* rank 0 .* with a histogram' where rank 1 .* without a"),
    ],
)
def test_a_mistake_of_one_rank_is_the_same_error_on_all(
    ranks: list[dict[str, Any]], mistake: str, named: str
) -> None:
    answers = {rank["refusals"][mistake] for rank in ranks}
    assert len(answers) == 1
    assert re.match(named, answers.pop())


def test_a_rank_killed_during_the_reduction_is_an_error_on_the_others_at_once(folder: Path) -> None:
    left = [rank for rank in range(RANKS) if rank != KILLED]
    assert not (folder / f"{KILLED}.lost.json").exists()
    for rank in left:
        found = json.loads((folder / f"{rank}.lost.json").read_text())
        assert re.match("RankLostError: .*KV observations: its own output.*gloo", found["message"])
        assert found["seconds"] < DEADLINE
