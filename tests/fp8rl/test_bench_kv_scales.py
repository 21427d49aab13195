"""The benchmark of recalibration times real forwards and real steps, and adds up what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fp8rl.bench import kv_scales_forward as forward
from fp8rl.bench.kv_scales import bench_kv_scales
from fp8rl.bench.kv_scales_report import print_result, save_picture
from fp8rl.bench.kv_scales_step import WARMUP_STEPS, StepCost
from fp8rl.bench.result import BenchResult
from fp8rl.cli import app
from fp8rl.config.file import parse_config
from fp8rl.config.model import ModelConfig
from fp8rl.run_dir import RunDir
from tests.fp8rl.run_helpers import TINY

STEPS = 2
SHAPE = forward.Shape("tiny", ModelConfig(num_layers=1), vocabulary=64, rows=2, time=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def result(folder: Path) -> BenchResult:
    config = parse_config(TINY | {"steps": STEPS, "warmup": {"steps": 1}})
    return bench_kv_scales([SHAPE], 3, config, ["engine"], folder)


def test_every_trainer_is_timed_alone_and_in_every_way_of_watching(result: BenchResult) -> None:
    hook = [row for row in result.rows if row["part"] == "hook"]
    assert {(row["trainer"], row["way"]) for row in hook} == {
        (trainer, way)
        for trainer in ("Megatron", "transformers")
        for way in (forward.ALONE, forward.AMAX, forward.PERCENTILE, forward.RATES)
    }
    assert all(0 < row["milliseconds"]["min"] <= row["milliseconds"]["max"] for row in hook)
    goals = {name: ratio.goal for name, ratio in result.ratios.items() if "forward" in name}
    assert goals["tiny, Megatron: forward alone / amax"] == 0.98
    assert goals["tiny, transformers: forward alone / percentile"] is None


def test_the_steps_are_those_of_a_run_whose_scales_the_engine_measured(
    result: BenchResult, folder: Path
) -> None:
    [row] = [row for row in result.rows if row["part"] == "step"]
    run = RunDir.open(folder / "steps-engine")
    assert "measured_by: engine" in run.config.read_text()
    lines = run.metrics()
    assert (row["steps"], len(lines)) == (STEPS, WARMUP_STEPS + STEPS)
    timed = [1e3 * float(line["time/step"]) for line in lines[WARMUP_STEPS:]]
    assert row["milliseconds"]["max"] == pytest.approx(max(timed))
    measuring = [1e3 * float(line["sync/kv_seconds"]) for line in lines[WARMUP_STEPS:]]
    assert row["recalibration"]["max"] > min(measuring) > 0
    assert set(row["phases"]) == {"observe", "publish", "rollout", "score", "train"}
    ratio = result.ratios["step without / with recalibration, measured by engine"]
    assert 0 < ratio.median < 1 and ratio.goal == 0.97


def test_what_counts_as_recalibration() -> None:
    cost = StepCost(
        {"observe": 1.0, "publish": 3.0, "train": 6.0},
        engine_measuring=0.5,
        engine_scales=0.25,
        engine_update=1.0,
    )
    assert (cost.step, cost.recalibration) == (10.0, 1.75)


def test_the_result_is_written_printed_and_drawn(result: BenchResult, tmp_path: Path) -> None:
    result.write(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert all(set(r) == {"median", "min", "max", "goal"} for r in found["ratios"].values())
    console = Console(width=120, record=True)
    print_result(result, console)
    text = console.export_text()
    assert all(name in text for name in (*found["ratios"], "recalibration, of that"))
    save_picture(result, tmp_path / "kv-scales.png")
    assert (tmp_path / "kv-scales.png").read_bytes().startswith(b"\x89PNG")


def test_a_bench_of_nothing_is_refused(tmp_path: Path) -> None:
    nothing = ["--model", "none", "--measured-by", "none", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, ["bench", "kv-scales", *nothing])
    assert (ran.exit_code, "nothing to measure" in ran.output) == (2, True)
