"""Over real Gloo ranks, in every layout of a trainer, the export is the one that one rank gives.

Four ranks hold each model (`megatron_ranks.py`) after loading the same checkpoint. On every rank,
in every layout, the exported tensors must be those of the checkpoint bit for bit, which
transformers loads with nothing left over; the FP8 tensors those of quantizing it whole; and the
logits of Megatron's model, in fp32, those of the Hugging Face model. A few cases run by default,
all in the long run.
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
from safetensors.torch import save_file

from fp8rl.quant import quantize_blockwise
from tests.sync.megatron_models import CONFIGS, checkpoint, hugging_face, tokens
from tests.sync.megatron_ranks import ALL, CASES, ODD, RANKS, SOME, digests, plan_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SAME_FUNCTION = 1e-5  # relative, in fp32; 2e-6 found
Facts = list[dict[str, Any]]


def run_ranks(folder: Path, which: str) -> Facts:
    """What every rank wrote."""
    wanted = {}
    for family in {family for family, _ in CASES[which]}:
        (folder / family).mkdir()
        with torch.no_grad():
            model = hugging_face(CONFIGS[family], checkpoint(CONFIGS[family]), folder / family)
            wanted[family] = model(tokens()).logits
    save_file(wanted, folder / "logits.safetensors")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sync.megatron_ranks", str(folder), which],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return run_ranks(tmp_path_factory.mktemp("some"), "some")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return run_ranks(tmp_path_factory.mktemp("all"), "all")


def check(ranks: Facts, family: str, layout: str) -> None:
    given, plan = checkpoint(CONFIGS[family]), plan_of(family)
    found = [rank[f"{family}, {layout}"] for rank in ranks]
    assert [one["exported"] for one in found] == [digests(given.items())] * RANKS
    encoded = digests(
        (name, quantize_blockwise(tensor) if plan.is_quantized(name) else tensor)
        for name, tensor in given.items()
    )
    assert [one["encoded"] for one in found] == [{}, encoded, {}, {}]  # to rank 1 alone
    errors = [one["error"] for one in found if one["error"] is not None]
    assert len(errors) == RANKS // (2 if "pp2" in layout else 1)
    assert max(errors) < SAME_FUNCTION


@pytest.mark.parametrize(("family", "layout"), SOME)
def test_a_layout_exports_the_same_model(some: Facts, family: str, layout: str) -> None:
    check(some, family, layout)


@pytest.mark.long
@pytest.mark.parametrize(("family", "layout"), ALL)
def test_every_layout_exports_the_same_model(everything: Facts, family: str, layout: str) -> None:
    check(everything, family, layout)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("a parameter more", r"SourceError: .*decoder\.layers\.3\.mlp\.surprise.* no Hugging Face"),
        ("a parameter less", r"SourceError: model\.layers\.3\.self_attn\.o_proj\.weight: .* a gap"),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_all(some: Facts, mistake: str, named: str) -> None:
    for rank in some:
        assert re.match(named, rank["mistakes"][mistake])


def test_a_pass_needs_no_more_than_a_layer_on_top_of_a_ranks_part(some: Facts) -> None:
    for rank in some:
        assert 0 < rank["memory"]["peak"] <= rank["memory"]["layer"]


def test_the_distributed_optimizer_pads_its_buffers_and_not_what_is_exported(some: Facts) -> None:
    found = [rank["distributed optimizer"] for rank in some]
    given = digests(checkpoint(ODD).items())
    assert all(one["padding"] > 0 and one["before"] == given for one in found)
    assert all(one["after"] == found[0]["after"] for one in found)
    assert all(found[0]["after"][name] != given[name] for name in given)
