"""What FSDP2 holds in parts is exported as save_pretrained would write it, and as its FP8.

Real Gloo ranks and transformers' own models (`fsdp_ranks.py`): four ranks in the default run, two
with every architecture among the long tests.
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
from torch import nn

from fp8rl.sync.errors import SourceError
from fp8rl.sync.fsdp import FSDPSource
from tests.sync.fsdp_ranks import layouts

pytestmark = pytest.mark.slow

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[4, pytest.param(2, marks=[pytest.mark.long])], name="ranks")
def started_once(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Answers:
    folder = tmp_path_factory.mktemp("ranks")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sync.fsdp_ranks", str(folder), str(request.param)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_every_layout_exports_what_save_pretrained_writes(ranks: Answers) -> None:
    """Names, dtypes and values, whole; and each in FP8 as gathering first and quantizing gives."""
    for rank in ranks:
        assert set(rank["differences"]) == set(layouts(len(ranks)))
        for name, found in rank["differences"].items():
            assert {"iterated", "master"} <= set(found)
            assert not any(found.values()), (name, found)


def test_the_layouts_are_what_their_names_say(ranks: Answers) -> None:
    found = ranks[0]["placements"]
    assert found["fsdp"] == ["Shard 0"]
    if len(ranks) == 4:
        assert found["hsdp"] == ["Replicate", "Shard 0", "Shard 1"]
        assert found["fsdp and tp"] == ["Shard 0", "Shard 1", "_StridedShard 0"]


def test_each_has_weights_to_quantize(ranks: Answers) -> None:
    for name, linears in ranks[0]["quantized"].items():
        assert len(linears) >= 10, name
    assert any("experts.2." in linear for linear in ranks[0]["quantized"]["fsdp"])


def test_a_state_dict_of_dtensors_is_a_source_too(ranks: Answers) -> None:
    """Wrappers' prefixes are taken off its names, and a tied head that it yields is left out."""
    for rank in ranks:
        assert rank["iterable"] == {"iterated": [], "master": [], "with head": []}


def test_mistakes_on_the_destination_of_an_iterable_reach_all_ranks(ranks: Answers) -> None:
    left = [rank["refusals"]["left"] for rank in ranks]
    assert left.pop(1) == "nothing"
    assert all(re.match("SourceError: rank 1 .*loop over its tensors was left", a) for a in left)
    nan = [rank["refusals"]["nan"] for rank in ranks]
    named = "NonFiniteWeightError: model.norm.weight: 256 non-finite"
    assert re.match(named, nan.pop(1))
    assert all(re.match(f"SourceError: rank 1 .*{named}", answer) for answer in nan)


def test_placements_that_are_no_boxes_are_refused_by_name(ranks: Answers) -> None:
    for rank in ranks:
        assert re.match(r"SourceError: weight: is placed as \(Partial", rank["refusals"]["partial"])
        assert re.match("SourceError: 0 is under FSDP1 .*fully_shard", rank["refusals"]["fsdp1"])


# One process, nothing sharded.


class Tiny(nn.Module):
    """A linear, and a buffer that a checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)
        self.register_buffer("bias_of_router", torch.ones(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_a_model_that_is_not_sharded_is_read_as_it_is_now() -> None:
    model = Tiny()
    source = FSDPSource(model)
    model.bias_of_router = torch.full((3,), 2.0)  # another object, as after a move to a device
    with torch.no_grad():
        model.linear.weight += 1
    assert dict(source).keys() == {"linear.weight", "bias_of_router"}
    assert torch.equal(dict(source)["bias_of_router"], torch.full((3,), 2.0))
    assert torch.equal(dict(source)["linear.weight"], model.linear.weight)
    assert not dict(source)["linear.weight"].requires_grad


def test_a_tensor_that_only_a_hook_puts_into_the_state_dict_is_refused() -> None:
    model = Tiny()
    model.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({"extra": torch.zeros(1)})
    )
    with pytest.raises(SourceError, match="extra: is in the model's state_dict, and no parameter"):
        FSDPSource(model)
