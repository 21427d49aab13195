"""`fp8rl bench correction`, small: every way computes the same, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fp8rl.bench.correction import bench_correction
from fp8rl.bench.correction_ways import OURS, TORCH
from fp8rl.cli import app

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "correction"
    small = ["--rows", "8", "--columns", "64", "--vocabulary", "512", "--rounds", "3"]
    done = CliRunner().invoke(app, ["bench", "correction", *small, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == str(out)
    return out


def test_it_leaves_figures_of_every_case_and_a_picture(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert result["bench"] == "correction" and result["device"] and result["environment"]
    cases = {row["case"] for row in result["rows"] if row["way"] == OURS}
    assert len(cases) == 4
    assert all(row["milliseconds"]["median"] > 0 for row in result["rows"])
    assert (folder / "correction.png").read_bytes().startswith(b"\x89PNG")
    speeds = [name for name in result["ratios"] if name.startswith("speed against torch")]
    assert len(speeds) == 1


def test_every_way_computes_the_same() -> None:
    rows = bench_correction(8, 64, 512, 3, CPU).rows
    plain = [row for row in rows if row["way"] == TORCH]
    assert len(plain) == 1
    for row in rows:
        assert row["largest_difference"] < 1e-3, row


def test_a_result_is_not_overwritten_and_a_missing_gpu_is_named(folder: Path) -> None:
    again = CliRunner().invoke(app, ["bench", "correction", "--out", str(folder)])
    assert again.exit_code == 2 and "holds a result already" in again.output
    if not torch.cuda.is_available():
        gone = CliRunner().invoke(app, ["bench", "correction", "--device", "cuda"])
        assert gone.exit_code == 2 and "no CUDA device" in gone.output
