"""The sync bench brings the same bytes in every way, and counts seconds, bytes and memory right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from fp8rl.bench import memory, sync_model
from fp8rl.bench import sync as bench
from fp8rl.bench.result import BenchResult
from fp8rl.bench.sync_bytes import Bucket, lay_out, views
from fp8rl.bench.sync_contest import Taken
from fp8rl.bench.sync_model import SHAPES, Policy
from fp8rl.bench.sync_report import print_result, save_picture
from fp8rl.bench.sync_ways import (
    BF16,
    CODES,
    COMMIT,
    DELTA,
    DISK,
    ENCODE,
    FLOOR,
    FULL,
    LOAD,
    MESSAGES,
    QUANTIZE,
    SCALES,
    THERE,
    TRANSPORT,
    VERIFY,
    Turn,
    wire_of,
)
from fp8rl.cli import app
from fp8rl.errors import ConfigError
from fp8rl.quant import EngineTensor, quantize_blockwise
from fp8rl.sync.admission import as_bytes

MIB = 2**20


def test_the_shapes_have_the_sizes_that_they_are_named_for() -> None:
    assert SHAPES["qwen3-0.6b"].sizes().weights == 596_049_920  # of Qwen/Qwen3-0.6B
    sizes = SHAPES["0.3b"].sizes()
    assert (sizes.weights, sizes.quantized) == (318_811_648, 20 * 12 * 2**20)
    others, scales = sizes.weights - sizes.quantized, sizes.quantized // 128**2
    assert sizes.engine_bytes == sizes.quantized + 4 * scales + 2 * others
    assert sizes.bf16_bytes == 637_623_296


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_engine_of_every_shape_has_room_for_a_sequence(shape: sync_model.Shape) -> None:
    model, settings = shape.model, shape.settings()
    a_token = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim  # k and v in BF16
    blocks = -(-settings.max_model_len // 128)  # of tokens, as vLLM has them on a CPU
    assert settings.kv_cache_bytes > (blocks + 1) * 128 * a_token


def test_a_step_moves_every_matrix_a_little_and_the_same_each_time() -> None:
    plan = SHAPES["tiny"].settings().plan()
    one, two = Policy(plan), Policy(plan)
    before = {name: weight.clone() for name, weight in one.weights.items()}
    one.step()
    two.step()
    for name, weight in one.weights.items():
        assert torch.equal(weight, two.weights[name])
        changed = float((weight != before[name]).float().mean())
        assert changed == 0.0 if weight.ndim == 1 else 0.015 < changed < 0.035, name
        if weight.ndim > 1:
            assert float(weight.float().std()) == pytest.approx(sync_model.SIGMA, rel=0.05)


def test_too_little_memory_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = SHAPES["0.3b"].sizes().memory_needed()
    assert 6 * 2**30 < needed < 16 * 2**30
    with pytest.raises(ConfigError, match=r"takes some 9 GiB, and 2\.0 GiB are free"):
        bench.refuse_without_memory("0.3B", 9 * 2**30, 2 * 2**30)
    monkeypatch.setattr(sync_model, "PROCESS_BYTES", 2**50)
    ran = CliRunner().invoke(app, ["bench", "sync", "--shape", "tiny", "--out", str(tmp_path)])
    assert (ran.exit_code, "choose a smaller --shape" in ran.output) == (2, True)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 256 * 128 + 100 + 128 * 128), max_size=6))
def test_bf16_arrives_whole_and_is_cast_however_it_is_cut(cuts: list[int]) -> None:
    """Cuts are between elements, as those of stages are."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (256, 128), "norm": (100,), "b.weight": (128, 128)}
    sent = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    run = torch.cat([as_bytes(tensor) for tensor in sent.values()])
    bucket = Bucket(shapes, {"a.weight", "b.weight"}, _cast)
    for _ in range(2):
        bucket.clear()
        for start, end in pairwise([0, *(2 * cut for cut in sorted(cuts)), len(run)]):
            piece = run[start:end].clone()
            bucket.take(piece)
            piece.zero_()  # the ring's slot is filled anew
        assert list(bucket.tensors) == [
            *("a.weight", "a.weight_scale_inv", "norm", "b.weight", "b.weight_scale_inv")
        ]
        for name in ("a.weight", "b.weight"):
            codes, scales = _cast(sent[name])
            assert torch.equal(as_bytes(bucket.tensors[name]), as_bytes(codes))
            assert torch.equal(bucket.tensors[f"{name}_scale_inv"], scales)
        assert torch.equal(bucket.tensors["norm"], sent["norm"])


def _cast(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = quantize_blockwise(weight)
    return q.data, q.scale_inv


def test_bytes_are_laid_out_side_by_side_and_shared() -> None:
    tensors = [
        EngineTensor("a", torch.float8_e4m3fn, (3, 5)),
        EngineTensor("b", torch.float32, (2, 2)),
        EngineTensor("c", torch.bfloat16, (40,)),
    ]
    layout, nbytes = lay_out(tensors)
    assert ([start for *_, start in layout], nbytes) == ([0, 64, 128], 256)
    data = torch.zeros(nbytes, dtype=torch.uint8)
    found = views(data, json.loads(json.dumps(layout)))  # as it comes over the wire
    assert [(n, t.dtype, tuple(t.shape)) for n, t in found.items()] == [tuple(t) for t in tensors]
    found["c"][-1] = 1.0
    assert data[:206].sum() == 0 and data[206:208].sum() > 0


def test_what_no_phase_took_is_the_commits() -> None:
    turn = Turn.of(2.0, {QUANTIZE: 0.5, LOAD: 1.25}, {})
    assert dict(turn.phases) == {QUANTIZE: 0.5, LOAD: 1.25, COMMIT: 0.25}


def test_bytes_on_the_wire_are_told_by_kind() -> None:
    def tensor(dtype: str, nbytes: int | None) -> dict[str, object]:
        return {"dtype": dtype, "parcel": None if nbytes is None else {"nbytes": nbytes}}

    tensors = [
        tensor("float8_e4m3fn", 100),
        tensor("float8_e4m3fn", 30),
        tensor("float32", 8),
        tensor("bfloat16", 50),
        tensor("bfloat16", None),  # unchanged
    ]
    messages = [{"stage": {"start": 0}}, {"manifest": {"tensors": tensors}}]
    said = sum(len(json.dumps(message)) for message in messages)
    expected = {CODES: 130, SCALES: 8, BF16: 50, MESSAGES: 320 - 188 + said}
    assert wire_of(messages, 320) == expected


def test_memory_of_another_process_is_told() -> None:
    """A child takes 64 MiB, and says when; a mark started afterwards forgets it."""
    program = "x = b'x' * 2**26; print(1, flush=True); del x; print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.readline()
        assert memory.high_water_mark(child.pid) - memory.resident(child.pid) > 60 * MIB
        memory.start_high_water_mark(child.pid)
        assert memory.high_water_mark(child.pid) - memory.resident(child.pid) < MIB
    finally:
        child.kill()
        child.communicate()


def turns(seconds: dict[str, float], wire: dict[str, dict[str, int]]) -> dict[str, Turn]:
    """One round; half of each turn is loading."""
    coding = {ENCODE: 0.1, TRANSPORT: 0.05, VERIFY: 0.1}
    return {
        name: Turn.of(s, {LOAD: s / 2, **(coding if name != DISK else {})}, wire[name])
        for name, s in seconds.items()
    }


@pytest.fixture
def measured() -> bench.Measured:
    """Two rounds, the second twice as slow."""
    seconds = {FULL: 1.0, DELTA: 1.5, THERE: 2.0, DISK: 4.0, FLOOR: 0.5}
    sent = {CODES: 3_000, SCALES: 1_000, BF16: 5_000, MESSAGES: 1_000}
    whole = {BF16: 10_000_000}
    wire = {FULL: {CODES: 6_000_000}, DELTA: sent, THERE: whole, DISK: whole, FLOOR: whole}
    rounds = [turns({n: f * s for n, s in seconds.items()}, wire) for f in (1.0, 2.0)]
    return bench.Measured(
        {name: [r[name] for r in rounds] for name in seconds},
        [(0.02, 0.03), (0.06, 0.04)],
        dict.fromkeys(seconds, Taken(10 * MIB, 20 * MIB)),
        dict.fromkeys(seconds, Taken(MIB, 2 * MIB)),
    )


SIZES = sync_model.Sizes(weights=5_000_000, quantized=4_000_000, engine_bytes=6_000_000)


def test_ratios_are_taken_within_a_round_and_stand_beside_their_goals(
    measured: bench.Measured,
) -> None:
    ratios = bench.ratios_of(measured, SIZES)
    assert {name: (r.median, r.goal) for name, r in ratios.items()} == {
        f"{FLOOR} / {FULL}": (0.5, pytest.approx(1 / 3)),
        f"{THERE} / {FULL}": (2.0, 3.0),
        f"{DISK} / {FULL}": (4.0, None),
        f"{FULL} / {DELTA}": (pytest.approx(2 / 3), 1.0),
        f"{FULL} / encoding and applying a delta": (pytest.approx(6.0), 1.0),
        f"{THERE} / {DELTA}": (pytest.approx(4 / 3), None),
        "BF16 bytes / bytes of a delta": (1000.0, 200.0),
        "BF16 bytes / bytes of a delta, FP8 weights alone": (2000.0, 400.0),
        f"{FULL} / its fingerprints": (20.0, 20.0),
    }


def test_rows_say_where_time_bytes_and_memory_go(measured: bench.Measured) -> None:
    rows = {row["part"]: row for row in bench.rows_of(measured)}
    full = rows[FULL]
    assert full["seconds"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert full["phases"][LOAD] == 0.75
    assert (full["wire_bytes"], rows[DELTA]["wire_bytes"]) == (6_000_000, 10_000)
    assert full["kept_bytes"] == {"trainer": 10 * MIB, "engine": 20 * MIB}
    assert full["peak_bytes"] == {"trainer": MIB, "engine": 2 * MIB}
    assert rows[bench.MEMCPY]["seconds"]["median"] == 0.05
    assert rows[bench.FINGERPRINTS]["seconds"]["median"] == pytest.approx(0.075)
    # 5.99 MB more to send, in half a second and in a whole one
    link = rows[bench.BREAK_EVEN]["gigabytes_per_second"]
    assert link == pytest.approx((5.99e6 / 0.5 + 5.99e6 / 1.0) / 2 / 1e9)


def test_a_delta_that_is_sooner_through_shared_memory_is_sooner_anywhere() -> None:
    full, delta = Turn(1.0, {}, {CODES: 100}), Turn(0.9, {}, {CODES: 1})
    assert bench.break_even(full, delta) == math.inf


def test_the_result_is_written_printed_and_drawn(measured: bench.Measured, tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    result = BenchResult(
        "sync",
        {"shape": f"{shape.name}: {shape.described()}", "weights": SIZES.weights},
        bench.ratios_of(measured, SIZES),
        bench.rows_of(measured),
        "a processor",
    )
    result.write(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert all(set(r) == {"median", "min", "max", "goal"} for r in found["ratios"].values())
    console = Console(width=80, record=True)
    print_result(result, console)
    text = console.export_text()
    assert all(word in text for word in ("ours, delta", "verify", "MiB peak, engine", "0.333"))
    assert "sooner than a full version on links slower than 0.01 GB/s" in text
    save_picture(result, tmp_path / "sync.png")
    assert (tmp_path / "sync.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_every_way_brings_new_weights_into_a_live_engine(tmp_path: Path) -> None:
    """The command opens them only if ours and those who quantize there bring the same bytes."""
    command = ["bench", "sync", "--shape", "tiny", "--rounds", "2", "--json", "--out"]
    ran = subprocess.run(
        [sys.executable, "-m", "fp8rl", *command, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    sizes, rows = SHAPES["tiny"].sizes(), {row["part"]: row for row in result["rows"]}
    ways = (FULL, DELTA, THERE, DISK, FLOOR)
    assert set(rows) == {*ways, bench.MEMCPY, bench.FINGERPRINTS, bench.BREAK_EVEN}
    for name in ways:
        row = rows[name]
        assert all(seconds > -1e-3 for seconds in row["phases"].values()), row
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"]["median"], rel=0.2)
        assert row["peak_bytes"]["engine"] > 0
    assert rows[FULL]["wire"][CODES] == rows[FULL]["wire"][SCALES] * 128**2 / 4 == sizes.quantized
    assert rows[THERE]["wire"] == {BF16: sizes.bf16_bytes}
    assert 0 < rows[DELTA]["wire"][CODES] < 0.01 * sizes.quantized
    assert rows[FULL]["kept_bytes"]["engine"] > sizes.engine_bytes  # the mirror
    assert set(rows[THERE]["phases"]) == {QUANTIZE, TRANSPORT, LOAD, COMMIT}
    assert (tmp_path / "sync.png").exists() and not list(tmp_path.rglob("*.safetensors"))
