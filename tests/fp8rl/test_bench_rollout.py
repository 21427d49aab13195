"""The rollout bench: the same requests for every arm, exact lengths, ratios within a round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from fp8rl.bench.result import BenchResult
from fp8rl.bench.rollout import ROUNDS, Bench, Engines, Workload, bench_rollout, saved_rounds
from fp8rl.bench.rollout_arms import ARMS, BF16, FP8, FP8_KV, ArmSettings, Point, Round, Turn
from fp8rl.bench.rollout_figures import ratios_of, rows_of
from fp8rl.bench.rollout_model import SHAPES, Subject, fitted, fitted_to_device, host_bytes
from fp8rl.bench.rollout_report import _draw_ratio, print_result, save_picture
from fp8rl.cli import app
from fp8rl.errors import ConfigError

GIB = 2**30
WORK = Workload(batches=(1, 3), tokens=4, lengths=(6,), prompt=8, update_every=2)
UPDATE = Point(3, 4, update_every=2)


def tiny() -> Subject:
    return Subject.of_shape("tiny", 512)


def test_points_are_the_batch_sizes_then_the_lengths_then_the_update() -> None:
    assert WORK.points() == [Point(1, 4), Point(3, 4), Point(3, 6), UPDATE]
    wide = replace(WORK, batches=(1, 4, 32), lengths=(4, 16), update_every=0)
    assert wide.points() == [Point(1, 4), Point(4, 4), Point(32, 4), Point(4, 16)]
    assert wide.cached_tokens() == 128 * 33  # one block for each of 32 responses, one to spare


def test_every_arm_of_a_round_gets_the_same_prompts_and_no_other_round_does() -> None:
    first = WORK.prompts(UPDATE, 1, 1000)
    assert [[len(p) for p in prompts] for prompts in first] == [[8, 8, 8]] * 2
    assert first == WORK.prompts(UPDATE, 1, 1000)
    seen = [tuple(p) for n in (1, 2) for prompts in WORK.prompts(UPDATE, n, 1000) for p in prompts]
    assert len(set(seen)) == 12


def test_the_shapes_are_those_they_are_named_for() -> None:
    assert Subject.of_shape("qwen3-8b", 512).weights() == 8_190_735_360  # of Qwen/Qwen3-8B
    assert Subject.of_shape("qwen3-30b-a3b", 512).weights() == 30_532_122_624
    assert set(SHAPES) >= {"tiny", "0.3b", "qwen3-0.6b"}


def test_a_model_that_memory_cannot_hold_is_cut_and_says_so() -> None:
    whole = Subject.of_shape("qwen3-8b", 512)

    def engine(model: Subject) -> ArmSettings:
        return ArmSettings(model.config, "bf16", 512, 8, 4096 * model.kv_bytes_per_token())

    cut = fitted(whole, engine, 24 * GIB, cuda=False)
    assert 1 <= cut.layers < 36
    assert host_bytes(cut, [engine(cut)], cuda=False) <= 24 * GIB
    more = whole.cut(cut.layers + 1)
    assert host_bytes(more, [engine(more)], cuda=False) > 24 * GIB
    assert cut.described() == f"Qwen3-8B, CUT to {cut.layers} of 36 layers, random weights"
    assert whole.described() == "Qwen3-8B, random weights"
    assert fitted_to_device(whole, 80 * GIB) == whole.cut(36)
    with pytest.raises(ConfigError, match="not even one layer of Qwen3-8B fits the free 2"):
        fitted(whole, engine, 2 * GIB, cuda=False)


def test_arms_differ_in_precision_alone() -> None:
    bench = Bench(tiny(), list(ARMS), WORK, Engines(cuda=False))
    settings = {arm: bench.settings(arm) for arm in ARMS}
    same = {
        replace(s, precision="bf16", activations=None, hf_config=None) for s in settings.values()
    }
    assert len(same) == 1
    assert {a: (s.precision, s.activations) for a, s in settings.items()} == ARMS


def test_on_cuda_engines_have_graphs_and_a_share_of_the_gpu(tmp_path: Path) -> None:
    cpu = Bench(tiny(), [BF16], WORK, Engines(cuda=False)).settings(BF16)
    gpu = ArmSettings(cpu.hf_config, "bf16", 512, 4, 2**20, gpu_memory=0.8)
    here, there = cpu.llm_arguments(tmp_path), gpu.llm_arguments(tmp_path)
    assert (here["enforce_eager"], there["enforce_eager"]) == (True, False)
    assert (there["gpu_memory_utilization"], there["kv_cache_memory_bytes"]) == (0.8, None)


def turn(arm: str, point: Point, seconds: float) -> Turn:
    updating = (0.5, 0.1 if arm == FP8_KV else 0.0) if point.update_every else (0.0, 0.0)
    return Turn(arm, point, seconds, [0.1, 0.3], [0.01, 0.03], 1, 2 * seconds, *updating)


@pytest.fixture
def rounds() -> list[Round]:
    """Two rounds: FP8 is 1.5 and 2 times as fast, FP8 with its cache twice and four times."""
    points = (Point(8, 4), Point(32, 4), Point(32, 4, 2))
    memory = {
        arm: {"kv_bytes": 1000, "kv_tokens": tokens, "device_bytes": 0, "resident_bytes": 5 * GIB}
        for arm, tokens in {BF16: 100, FP8: 100, FP8_KV: 200}.items()
    }
    seconds = ({BF16: 6.0, FP8: 4.0, FP8_KV: 3.0}, {BF16: 12.0, FP8: 6.0, FP8_KV: 3.0})
    return [
        Round([turn(a, p, s) for p in points for a, s in r.items()], memory, 1.5) for r in seconds
    ]


DESCRIBED = {
    "model": "0.3B, random weights",
    "weights": 320_000_000,
    "arms": [BF16, FP8, FP8_KV],
    "tokens": 4,
    "length_batch": 8,
    "cuda": False,
    "weight_bytes": {BF16: 4000, FP8: 2000, FP8_KV: 2000},
}


def test_ratios_are_taken_within_a_round_and_stand_beside_their_goals(rounds: list[Round]) -> None:
    ratios = {
        name: (r.median, r.min, r.max, r.goal) for name, r in ratios_of(rounds, DESCRIBED).items()
    }
    assert ratios["fp8 / bf16, tokens/s, 8 x 4"] == (1.75, 1.5, 2.0, 1.25)
    assert ratios["fp8 / bf16, tokens/s, 32 x 4"] == (1.75, 1.5, 2.0, 1.0)
    assert ratios["fp8-kv / bf16, tokens/s, 8 x 4"] == (3.0, 2.0, 4.0, None)
    assert ratios["fp8 / bf16, tokens/s, 32 x 4, an update before every 2"] == (
        1.75,
        1.5,
        2.0,
        None,
    )
    assert ratios["fp8-kv / bf16, KV tokens in the same KV bytes"][0::3] == (2.0, 2.0)
    # 2000 bytes that weights leave free hold 200 tokens more, or 400
    assert ratios["fp8 / bf16, KV tokens in the same memory in all"][0] == 3.0
    assert ratios["fp8-kv / bf16, KV tokens in the same memory in all"][0] == 6.0


def test_goals_are_for_a_cpu_and_models_of_that_size(rounds: list[Round]) -> None:
    for other in ({"weights": 8_000_000_000}, {"cuda": True}):
        goals = {n: r.goal for n, r in ratios_of(rounds, DESCRIBED | other).items()}
        assert all(goal is None for name, goal in goals.items() if "tokens/s" in name)


def test_rows_have_speed_percentiles_and_what_updates_cost(rounds: list[Round]) -> None:
    rows = {
        (r["arm"], r["batch"], r["update_every"]): r
        for r in rows_of(rounds, DESCRIBED)
        if r["part"] == "speed"
    }
    row = rows[FP8_KV, 32, 2]
    assert row["tokens_per_second"] == {
        "median": 32 * 4 * 2 / 3,
        "min": 32 * 8 / 3,
        "max": 32 * 8 / 3,
    }
    assert (row["update_seconds"], row["recalibration_seconds"], row["preemptions"]) == (
        0.5,
        0.1,
        2,
    )
    assert row["first_token_seconds"]["p50"] == pytest.approx(0.2)
    assert row["output_token_seconds"]["p99"] == pytest.approx(0.03)
    assert row["cores"] == 2.0
    assert "update_seconds" not in rows[FP8_KV, 32, 0]


def test_the_result_is_written_printed_and_drawn(rounds: list[Round], tmp_path: Path) -> None:
    settings = DESCRIBED | {"rounds": 2, "load": [1.5, 1.5], "model": "8B, CUT to 3 of 36 layers"}
    rows = rows_of(rounds, DESCRIBED)
    result = BenchResult("rollout", settings, ratios_of(rounds, DESCRIBED), rows, "a processor")
    result.write(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["load"] == [1.5, 1.5]
    console = Console(width=80, record=True)
    print_result(result, console)
    text = console.export_text()
    for words in ("CUT to 3 of 36 layers", "32 x 4 +update", "200 / 300", "fp8-kv 0.50 (0.10)"):
        assert words in text
    save_picture(result, tmp_path / "rollout.png")
    assert (tmp_path / "rollout.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_a_goal_ends_where_the_goal_does_and_is_named_there() -> None:
    seconds = {BF16: 6.0, FP8: 4.0}
    points = [Point(batch, 4) for batch in (1, 8, 16, 32)]
    memory = {
        a: {"kv_bytes": 1, "kv_tokens": 1, "device_bytes": 0, "resident_bytes": 1} for a in seconds
    }
    described = DESCRIBED | {"arms": [*seconds]}
    rounds = [Round([turn(a, p, s) for p in points for a, s in seconds.items()], memory, 1.0)]
    for settings, ends in ((described, [0.8, 8.0]), (described | {"cuda": True}, None)):
        rows = [row for row in rows_of(rounds, settings) if row["part"] == "speed"]
        result = BenchResult("rollout", settings, ratios_of(rounds, settings), rows, "a processor")
        axes = Figure().subplots()
        _draw_ratio(axes, result, rows)
        dotted = [c for c in axes.collections if c.get_linestyle()[0][1]]
        named = [text for text in axes.texts if "goal" in text.get_text()]
        assert [[x for x, _ in c.get_segments()[0]] for c in dotted] == ([ends] if ends else [])
        assert [(text.get_text(), text.xy) for text in named] == (
            [("goal 1.25", (8, 1.25))] if ends else []
        )


def test_rounds_are_gone_on_with_but_not_those_of_another_bench(
    rounds: list[Round], tmp_path: Path
) -> None:
    path = tmp_path / ROUNDS
    assert saved_rounds(path, DESCRIBED) == []
    with path.open("a") as file:
        file.write(json.dumps(rounds[0].to_json()) + "\n" + '{"turns": [{"arm": "bf')
    assert saved_rounds(path, DESCRIBED) == rounds[:1]
    assert path.read_text().endswith("}\n")  # what a kill left is gone
    with pytest.raises(ConfigError, match="another model, of other arms"):
        saved_rounds(path, DESCRIBED | {"tokens": 5})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "or --shape, one of the two"),
        (["model", "--shape", "tiny"], "or --shape, one of the two"),
        (["nowhere"], "is not a folder"),
        (["--shape", "tiny", "--arms", "fp8"], "bf16 must be among the arms"),
        (["--shape", "tiny", "--arms", "bf16,fp4"], "fp4: on cpu there are bf16, fp8"),
        (["--shape", "tiny", "--batches", "1;2"], "positive integers with commas"),
        (["--shape", "tiny", "--gpu-memory", "0.5"], "for --gpu-memory: is for --device cuda"),
        (
            ["--shape", "tiny", "--device", "cuda", "--kv-cache-gib", "1"],
            "for --kv-cache-gib: is for a CPU",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(app, ["bench", "rollout", *arguments, "--out", str(tmp_path / "out")])
    said = " ".join(ran.output.replace("\u2502", " ").split())
    assert (ran.exit_code, words in said) == (2, True), said
    assert not (tmp_path / "out").exists()


def test_an_fp8_checkpoint_is_refused_with_the_way_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match=r"fp8rl quantize .* --to bf16"):
        Subject.of_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollout")


@pytest.fixture(scope="module")
def measured(folder: Path) -> BenchResult:
    """One round of two arms on real engines."""
    bench = Bench(tiny(), [BF16, FP8_KV], WORK, Engines(cuda=False))
    return bench_rollout(bench, 1, folder)


@pytest.mark.slow
def test_real_engines_give_every_token_that_was_asked_for(
    measured: BenchResult, folder: Path
) -> None:
    [line] = (folder / ROUNDS).read_text().splitlines()[1:]
    turns = Round.from_json(json.loads(line)).turns
    assert {(t.arm, t.point) for t in turns} == {
        (a, p) for a in (BF16, FP8_KV) for p in WORK.points()
    }
    for t in turns:
        requests = t.point.batch * max(1, t.point.update_every)
        assert (len(t.first), len(t.each), t.preemptions) == (requests, requests, 0)
        # a request's own times are part of the turn, and all tokens are in them
        longest = max(f + e * (t.point.tokens - 1) for f, e in zip(t.first, t.each, strict=True))
        assert 0 < longest < t.seconds - t.update
        assert (t.update > 0) == bool(t.point.update_every)
        assert (t.recalibration > 0) == (t.arm == FP8_KV and t.update > 0)
    memory = {row["arm"]: row for row in measured.rows if row["part"] == "memory"}
    assert memory[FP8_KV]["kv_tokens"] == 2 * memory[BF16]["kv_tokens"]
    assert memory[FP8_KV]["kv_bytes"] <= memory[BF16]["kv_bytes"]
    if sys.platform == "linux":
        assert memory[BF16]["resident_bytes"] > 100 * 2**20


@pytest.mark.slow
def test_a_bench_whose_rounds_are_done_starts_no_engine(
    measured: BenchResult, folder: Path
) -> None:
    bench, children = Bench(tiny(), [BF16, FP8_KV], WORK, Engines(cuda=False)), []
    done = lambda: children.append(psutil.Process().children())  # noqa: E731
    again = bench_rollout(bench, 1, folder, done=done)
    assert (again.rows, again.ratios) == (measured.rows, measured.ratios)
    assert children == [[]] * 8  # two arms at four points are counted as done


def write_checkpoint(folder: Path, **more: object) -> None:
    """The tiny shape as a Hugging Face checkpoint."""
    subject = tiny()
    (folder / "config.json").write_text(json.dumps(dict(subject.config) | more))
    save_file(dict(subject.source()), folder / "model.safetensors")


@pytest.mark.long
def test_the_command_measures_a_checkpoint_and_counts_preemptions(tmp_path: Path) -> None:
    """Four sequences of 228 tokens, in a cache of about 600."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_checkpoint(model)
    work = ["--batches", "4", "--tokens", "200", "--lengths", "none", "--prompt", "28"]
    small = ["--arms", "bf16,kv-only", "--kv-cache-gib", "0.0006", "--update-every", "0"]
    command = ["bench", "rollout", str(model), *work, *small, "--rounds", "1", "--json", "--out"]
    ran = subprocess.run(
        [sys.executable, "-m", "fp8rl", *command, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["settings"]["model"] == "model, checkpoint"
    speed = {row["arm"]: row for row in result["rows"] if row["part"] == "speed"}
    assert speed[BF16]["preemptions"] > 0 == speed["kv-only"]["preemptions"]
    assert (out / "rollout.png").exists()


@pytest.mark.gpu
def test_engines_on_a_gpu_are_measured(tmp_path: Path) -> None:
    bench = Bench(tiny(), [BF16, FP8], WORK, Engines(cuda=True, gpu_memory=0.3))
    result = bench_rollout(bench, 1, tmp_path)
    speed = [row for row in result.rows if row["part"] == "speed"]
    assert len(speed) == 8 and all(row["tokens_per_second"]["min"] > 0 for row in speed)
    assert result.device == torch.cuda.get_device_name(0)
