"""The benchmark compares what it says it compares, and leaves a result that a program can read."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fp8rl.bench import quant_ways as ways
from fp8rl.bench.quant import MODELS, SQUARE, bench_quant, shapes_of
from fp8rl.bench.quant_report import print_result, save_picture
from fp8rl.bench.result import Ratio
from fp8rl.bench.timing import MIN_SECONDS, take_turns, temporary_bytes
from fp8rl.cli import app

CPU = torch.device("cpu")


def test_ratios_are_taken_within_a_round():
    ratio = Ratio.of([2.0, 30.0, 8.0], [1.0, 10.0, 2.0], goal=1.5)
    assert ratio == Ratio(median=3.0, min=2.0, max=4.0, goal=1.5)


def test_every_way_has_a_turn_in_every_round_and_short_ones_are_repeated():
    calls, rounds = {"a": 0, "b": 0}, []

    def way(name):
        def call():
            calls[name] += 1

        return call

    seconds = take_turns({n: way(n) for n in calls}, 4, CPU, lambda: rounds.append(1))
    assert len(rounds) == 4
    assert all(len(seconds[n]) == 4 and calls[n] > 100 for n in calls)
    assert all(0 < s < MIN_SECONDS for found in seconds.values() for s in found)


def test_memory_of_a_call_is_seen_also_when_it_was_called_before():
    held = torch.ones(1)

    def call():
        for mib in (64, 16):
            torch.ones(mib * 2**18).add_(held)

    hole = [torch.ones(20 * 2**18) for _ in range(5)]  # that the C library keeps, once it is free
    del hole
    for _ in range(2):
        assert 60 * 2**20 < temporary_bytes(call, CPU) < 80 * 2**20
    assert temporary_bytes(lambda: held.add_(1), CPU) < 4 * 2**20


def test_the_shapes_are_those_of_the_models_linears():
    names = shapes_of(list(MODELS))
    assert next(iter(names)) == next(iter(SQUARE))
    assert all(size % 128 == 0 for shape in names.values() for size in shape[-2:])


@pytest.fixture(scope="module")
def result():
    return bench_quant({"small": (256, 384), "experts": (2, 128, 256)}, 3, CPU)


def test_every_way_casts_to_the_bytes_of_the_reference(result):
    casts = [row for row in result.rows if row["way"] not in (ways.CLONE, ways.COPY)]
    assert {row["way"] for row in casts} >= {ways.OURS, ways.VLLM, ways.HUGGING_FACE, ways.TORCHAO}
    for row in casts:
        assert row["codes_equal"] == row["scales_equal"] == 1.0, row


def test_bandwidth_counts_each_byte_once(result):
    of = {(row["shape"], row["way"]): row for row in result.rows}
    for way, nbytes in ((ways.CLONE, 4 * 98304), (ways.OURS, 3 * 98304 + 4 * 6)):
        row = of["small", way]
        expected = nbytes / (row["milliseconds"]["median"] * 1e6)
        assert row["gigabytes_per_second"] == pytest.approx(expected)
    row = of["experts", ways.OURS]
    expected = (3 * 65536 + 4 * 4) / (row["milliseconds"]["median"] * 1e6)
    assert row["gigabytes_per_second"] == pytest.approx(expected)


def test_the_result_is_written_printed_and_drawn(result, tmp_path):
    result.write(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["ratios"]["GB/s against torch.clone"]["goal"] == 0.30
    assert all(set(r) == {"median", "min", "max", "goal"} for r in found["ratios"].values())
    assert found["device"] and found["command"] and found["environment"]["versions"]["torch"]
    console = Console(width=80, record=True)
    print_result(result, console)
    text = console.export_text()
    assert all(name in text for name in (*found["ratios"], ways.TORCHAO, "same"))
    save_picture(result, tmp_path / "quant.png")
    assert (tmp_path / "quant.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_a_result_is_not_measured_over(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    ran = CliRunner().invoke(app, ["bench", "quant", "--out", str(tmp_path)])
    assert ran.exit_code == 2 and "holds a result already" in ran.output
    assert (tmp_path / "result.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path):
    ran = CliRunner().invoke(app, ["bench", "quant", "--device", "cuda", "--out", str(tmp_path)])
    assert ran.exit_code == 2 and "no CUDA device" in ran.output
