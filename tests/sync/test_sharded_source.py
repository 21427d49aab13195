"""Shards on four real Gloo ranks arrive whole, as FP8 equal to gathering first, or not at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.quant import Box, NonFiniteWeightError, QuantizedTensor, quantize_blockwise
from fp8rl.sync import shard_pass
from fp8rl.sync.errors import SourceError
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import TensorMeta, WeightSource
from tests.sync.sharded_model import (
    LAYOUTS,
    METADATA,
    PLAN,
    RANKS,
    WEIGHTS,
    gathered,
    layout,
    shards,
    wrong,
)

Answers = list[dict[str, Any]]
MIB = 2**20
WORD = 24  # bytes of one agreement


def run(folder: Path, what: str, killed: int = 0) -> Answers:
    """What every rank wrote (but one that was killed)."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sync.sharded_source_ranks", str(folder), what, str(killed)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )
    found = sorted(folder.glob("?.json"))
    assert len(found) == RANKS - (what not in ("core", "all")), ran.stderr[-3000:]
    return [json.loads(path.read_text()) for path in found]


@pytest.fixture(
    scope="module", params=["core", pytest.param("all", marks=[pytest.mark.long])], name="ranks"
)
def started_once(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Answers:
    return run(tmp_path_factory.mktemp("ranks"), request.param)


def test_what_arrives_is_what_gathering_first_gives_bit_for_bit(ranks: Answers) -> None:
    """In every layout and for every destination; elsewhere nothing is yielded."""
    found = ranks[0]["wrong"]
    assert {f"{name}, {way}" for name in LAYOUTS[:2] for way in ("to one", "to two")} <= set(found)
    assert {"fp8, fp8", "fp8, bf16", "fp32, master", "fp32, export", "a pair"} <= set(found)
    assert "fp32, export, fp32 scales" in found
    assert [{case: names for case, names in r["wrong"].items() if names} for r in ranks] == [{}] * 4


def test_cuts_go_through_blocks() -> None:
    """Or else the test above would not have met a scale that ranks share."""
    boxes = layout("random 1")
    cut = [
        name
        for name, of_ranks in boxes.items()
        if PLAN.is_quantized(name)
        and any(box and any(start % 128 for start in box.offset) for box in of_ranks)
    ]
    assert len(cut) > 4


def test_fp8_moves_at_most_052_of_the_bytes_of_bf16(ranks: Answers) -> None:
    """Of all bytes that torch.distributed was given, agreements among them."""
    for name in ranks[0]["bytes"]:
        fp8, bf16, weights = (sum(rank["bytes"][name][i] for rank in ranks) for i in range(3))
        assert bf16 > MIB, name
        assert fp8 <= 0.52 * bf16, (name, fp8 / bf16)
        assert 0 <= fp8 - weights <= RANKS * 24 * WORD, name


def test_a_rank_that_is_no_destination_needs_one_bucket_of_memory(ranks: Answers) -> None:
    """Of 4 MiB, and what the cast of one tensor needs; the model in FP8 is 80 MiB."""
    assert all(rank["memory"] < 32 * MIB for rank in ranks)


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("a gap", r"gate_proj.weight: .* leave a gap: .* \(256, 0\) .* ranks \[0, 1, 3\] hold one"),
        ("an overlap", r"gate_proj.weight: .* overlap: parts \[0, 1\] all hold .* \(1, 0\)"),
        ("outside", r"gate_proj.weight: rank 3 .* \[128, 256\] at \[400, 0\].* \[512, 256\]"),
        ("other metadata", r"embed_tokens.*\(64, 256\)' where rank 1 has .*\(65, 256\)"),
        ("other destinations", r"'to=\[0, 1\], .* where rank 1 has 'to=\[0\],"),
        ("no rank", r"to must be ranks of a group of 4, found \[0, 4\]"),
        ("other plan", r"q_proj.weight: torch.float8_e4m3fn' where rank 3 has .*bfloat16"),
        ("plan of another", r"the source lacks 4 tensor\(s\), the first .*q_norm"),
        ("fp8 and bf16", r"gate_proj.weight: some ranks hold their part in FP8, others in"),
        ("fp8 cut within a block", r"q_proj.weight: the trainer holds it in FP8, and its box"),
    ],
)
def test_what_all_can_see_is_one_error_on_all(ranks: Answers, mistake: str, named: str) -> None:
    for rank in ranks:
        assert re.search(f"^SourceError: .*{named}", rank["refusals"][mistake])


@pytest.mark.parametrize(
    ("mistake", "at", "error"),
    [
        ("unknown", 3, "SourceError: a shard is described of 'model.gate', which is not in"),
        (
            "two boxes",
            3,
            "SourceError: model.layers.1.self_attn.o_proj.weight: this rank describes",
        ),
        ("shape", 1, r"SourceError: .*gate_proj.weight: .* reads as \(100, 256\) of .*bfloat16"),
        ("dtype", 1, r"SourceError: model.norm.weight: .* reads as \(64,\) of torch.float32"),
        ("breaks", 3, "OSError: no such parameter"),
        ("other scales", 2, r"SourceError: .*q_proj.weight: .* with scales 'fp32'"),
    ],
)
def test_what_one_rank_cannot_do_is_told_to_all(
    ranks: Answers, mistake: str, at: int, error: str
) -> None:
    answers = [rank["refusals"][mistake] for rank in ranks]
    assert re.match(error, answers[at])
    told = f"SourceError: rank {at} of the trainer's group broke off the pass .*: {error}"
    assert all(re.match(told, other) for rank, other in enumerate(answers) if rank != at)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("inf in a weight", r"model.layers.1.mlp.gate_proj.weight: 2 .* index \[20, 3\] \(inf\)"),
        ("inf in a weight of one rank", r".*gate_proj.weight: 1 .* index \[300, 7\] \(inf\)"),
        ("inf in a norm", r"model.norm.weight: 2 non-finite .* index \[70\] \(inf\)"),
        ("inf in two", r"model.embed_tokens.weight: 3 non-finite .* index \[5, 5\] \(inf\)"),
        ("nan in fp8", r".*gate_proj.weight: 1 non-finite .* index \[131, 5\] \(nan\)"),
    ],
)
def test_a_value_that_is_not_finite_is_the_same_error_on_every_rank(
    ranks: Answers, mistake: str, message: str
) -> None:
    answers = {rank["refusals"][mistake] for rank in ranks}
    assert len(answers) == 1
    assert re.match(f"NonFiniteWeightError: {message}", answers.pop())


@pytest.mark.parametrize("when", ["left at once", "left at the end"])
def test_a_destination_that_leaves_its_loop_stops_the_others(ranks: Answers, when: str) -> None:
    answers = [rank["refusals"][when] for rank in ranks]
    assert answers[2] == "nothing"
    del answers[2]
    assert all(
        re.match("SourceError: rank 2 .*the loop over its tensors was left", a) for a in answers
    )


def test_a_good_pass_works_after_all_that(ranks: Answers) -> None:
    assert [rank["refusals"]["none"] for rank in ranks] == ["nothing"] * RANKS


DEATHS = [(at, rank) for at in ("read", "move", "use") for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("at", "killed"),
    [
        pytest.param(*death, marks=[] if death == ("move", 1) else [pytest.mark.long])
        for death in DEATHS
        if death[0] != "use" or death[1] == 0
    ],
)
def test_a_rank_that_ends_is_an_error_on_all_others_at_once(
    tmp_path: Path, at: str, killed: int
) -> None:
    """Though none of them ends, and most talk to another than the one that did."""
    for rank in run(tmp_path, at, killed):
        assert re.match(
            "RankLostError: a trainer rank was lost.*start the run again", rank["error"]
        )
        assert rank["seconds"] < 5
        assert re.match("RankLostError: .*in an earlier pass", rank["again"])


# One process, without torch.distributed.


def test_a_process_alone_needs_no_distributed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "BUCKET_BYTES", MIB)
    source = ShardedSource(METADATA, shards(layout("one rank", ranks=3), 2))
    assert isinstance(source, WeightSource)
    assert source.metadata() == METADATA
    for _ in range(2):
        assert wrong(dict(source), dict(WEIGHTS)) == []
        assert wrong(dict(source.encoded(PLAN, to=[0])), gathered(PLAN, WEIGHTS)) == []
    assert source.wire_bytes == 0


def alone(name: str, part: torch.Tensor | QuantizedTensor, dtype: torch.dtype) -> ShardedSource:
    """The model with one tensor another."""
    metadata = [TensorMeta(m.name, dtype if m.name == name else m.dtype, m.shape) for m in METADATA]
    held = {**WEIGHTS, name: part}
    mine = [
        LocalShard(m.name, Box((0,) * len(m.shape), m.shape), lambda part=held[m.name]: part)  # type: ignore[misc]
        for m in metadata
    ]
    return ShardedSource(metadata, mine)


def test_a_new_pass_reads_the_newest_weights() -> None:
    name = "model.norm.weight"
    live = WEIGHTS[name].clone()
    source = alone(name, live, live.dtype)
    before = dict(source.encoded(PLAN, to=[0]))[name].clone()
    live += 1
    after = dict(source.encoded(PLAN, to=[0]))[name]
    assert torch.equal(after, live) and not torch.equal(before, live)


def test_fp32_that_overflows_bf16_is_refused_as_what_is_sent() -> None:
    norm = WEIGHTS["model.norm.weight"].float()
    norm[7] = 3.4e38
    with pytest.raises(NonFiniteWeightError, match=r"model.norm.weight: 1 .*index \[7\] \(inf\)"):
        list(alone("model.norm.weight", norm, torch.float32).encoded(PLAN, to=[0]))


def test_fp32_weights_must_be_said_to_be_masters_or_exports() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = alone(name, WEIGHTS[name].float() * 1.003, torch.float32)
    with pytest.raises(SourceError, match=f"{name}: is fp32, and fp32_as is None"):
        list(source.encoded(PLAN, to=[0]))
    found = dict(source.encoded(PLAN, to=[0], fp32_as="master"))[name]
    want = quantize_blockwise(WEIGHTS[name].float() * 1.003, fp32_as="master")
    assert wrong({name: found}, {name: want}) == []
