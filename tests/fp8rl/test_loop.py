"""A run from its command line to its report: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fp8rl.config.file import load_config
from fp8rl.report.glossary import UNDEFINED, definition
from fp8rl.stopping import StopRequest
from fp8rl.trainer.distributed import init_distributed
from tests.fp8rl.conftest import Whole
from tests.fp8rl.run_helpers import STEPS, TINY, Command, metrics, write_config

ALWAYS = {"step", "version", "sync/bytes", "sync/bf16_bytes", "sync/seconds", "time/step"}
LEARNED = {"reward/train", "loss", "grad_norm", "rollout_corr/k3_kl", "rollout/tokens_per_second"}
ON_POLICY = {"rollout/segments": 1, "rollout/unfinished": 0, "rollout/max_age": 0}
TENSORS = [f"{layer}/{x}" for layer in range(2) for x in "qkv"]
SCALES = {"kv/tokens", *(f"kv_scale/{tensor}" for tensor in TENSORS)}
RATES = {"kv/saturation_max"} | {
    f"kv_{rate}/{tensor}" for rate in ("saturation", "underflow") for tensor in TENSORS
}


def test_a_run_ends_well_and_leaves_no_process_and_no_memory(whole: Whole) -> None:
    assert whole.end.code == 0, whole.end.errors
    assert (whole.end.engines, whole.end.segments) == (1, 1)
    assert (whole.end.survivors, whole.end.litter) == ([], set())


def test_json_is_one_object_on_the_last_line(whole: Whole) -> None:
    last = whole.end.output.splitlines()[-1]
    assert json.loads(last) == json.loads((whole.folder / "result.json").read_text())


def test_every_step_has_one_line_of_metrics_and_the_last_version_is_published(whole: Whole) -> None:
    lines = metrics(whole.folder)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(line["version"] == line["step"] for line in lines)
    assert all(line.keys() >= ALWAYS | SCALES for line in lines)
    assert all(line.keys() >= LEARNED | RATES for line in lines[:-1])
    assert all(0 < line["kv/tokens"] <= TINY["kv_scales"]["calibration_tokens"] for line in lines)


def test_every_metric_has_a_definition(whole: Whole) -> None:
    keys = {key for line in metrics(whole.folder) for key in line} - {"step", "version"}
    assert [key for key in sorted(keys) if definition(key).what == UNDEFINED] == []


def test_without_segments_a_step_samples_what_it_trains_on_in_one_call(whole: Whole) -> None:
    for line in metrics(whole.folder)[:-1]:
        assert {name: line[name] for name in ON_POLICY} == ON_POLICY
        assert line["rollout/tokens"] == 32 * line["response/mean_length"]  # 8 prompts x 4


@pytest.mark.slow
def test_scales_measured_in_the_engine_serve_a_bf16_model_with_an_fp8_cache(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    end = Command(
        folder,
        write_config(tmp_path),
        *(f"run_dir={folder}", "steps=3", "warmup.steps=5", "rollout.precision=kv-only"),
        *("kv_scales.measured_by=engine", "kv_scales.calibrate_on=prompts"),
        *("kv_scales.observer.kind=percentile", "kv_scales.observer.percent=99.9"),
        "kv_scales.warn_saturation=0",
    ).end()
    assert end.code == 0, end.errors
    assert "lie beyond its scale" in end.output  # what the percentile leaves out
    lines = metrics(folder)
    assert len(lines) == 4
    assert all(line.keys() >= SCALES for line in lines)
    assert all(line["rollout_corr/k3_kl"] < 0.01 for line in lines[:-1])
    assert all(0 < line["kv/saturation_max"] < 0.01 for line in lines[:-1])  # beyond 99.9 percent
    assert all(line["sync/bytes"] >= line["sync/bf16_bytes"] for line in lines)  # BF16 weights


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("mode", ["decoupled", "bypass"])
def test_what_the_last_pipeline_stage_knows_is_in_the_metrics(tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "run"
    reject = "{kind: reject, level: token, low: 0.7, high: 1.4}"
    end = Command(
        folder,
        write_config(tmp_path),
        *(f"run_dir={folder}", "steps=2", "warmup.steps=5", "trainer.pipeline_parallel=2"),
        *(f"correction.mode={mode}", f"correction.stages=[{reject}]", "loss.preset=gspo"),
    ).end()
    assert end.code == 0, end.errors
    for line in metrics(folder)[:-1]:
        assert 0.5 < line["policy/ratio_mean"] < 2
        assert 0 < line["rollout_corr/k3_kl"] < 1
        assert 0 <= line["rollout_corr/rollout_rs_masked_fraction"] < 1
        assert ("time/score" in line) == (mode == "decoupled"), "bypass scores nothing"


def test_held_out_reward_is_measured_at_the_start_when_due_and_at_the_end(whole: Whole) -> None:
    measured = [line["step"] for line in metrics(whole.folder) if "reward/heldout" in line]
    assert measured == [*range(0, STEPS + 1, TINY["eval_every"]), STEPS]


def test_the_engines_held_out_reward_is_a_sample_of_the_trainers(whole: Whole) -> None:
    lines = [line for line in metrics(whole.folder) if "reward/heldout" in line]
    sampled = [line["reward/heldout"] for line in lines]
    expected = [line["reward/heldout_trainer"] for line in lines]
    assert all(0 < probability < 1 for probability in expected)
    drawn = TINY["task"]["heldout_prompts"] * len(lines)
    error = (sum(p * (1 - p) for p in expected) / len(lines) / drawn) ** 0.5
    assert abs(sum(sampled) - sum(expected)) / len(lines) < 4 * error, (sampled, expected)


def test_the_run_learned_and_engine_and_trainer_agreed(whole: Whole) -> None:
    lines = metrics(whole.folder)[:-1]
    assert any(line["reward/train"] > 0 and line["grad_norm"] > 0 for line in lines)
    # of a step's 60 tokens one alone, whose ratio is 3, makes 0.01: the run's mean is FP8's own
    k3 = [line["rollout_corr/k3_kl"] for line in lines]
    assert min(k3) > 0 and sum(k3) / len(k3) < 0.005, k3
    assert all(line["sync/bytes"] < 0.6 * line["sync/bf16_bytes"] for line in lines)


def test_the_folder_holds_what_the_command_promises(whole: Whole) -> None:
    for name in ("config.yaml", "metrics.jsonl", "result.json", "report.html", "curves.png"):
        assert (whole.folder / name).stat().st_size > 0, name
    again = load_config(whole.folder / "config.yaml")
    assert again == load_config(whole.config, [f"run_dir={whole.folder}"])


def test_a_folder_that_holds_a_run_is_refused_before_an_engine_starts(whole: Whole) -> None:
    before = (whole.folder / "engine.log").stat().st_size
    began = time.monotonic()
    end = Command(whole.folder, whole.config, f"run_dir={whole.folder}").end()
    assert time.monotonic() - began < 30  # 2 on an idle machine: python, torch, no engine
    assert end.code == 2
    [line] = end.errors.splitlines()
    assert f"--resume {whole.folder}" in line
    assert (whole.folder / "engine.log").stat().st_size == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals, whole: Whole) -> None:
    before = signal.getsignal(number)
    with init_distributed(load_config(whole.config)), StopRequest() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
