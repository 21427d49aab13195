"""`fp8rl doctor RUN_DIR`: scale, saturation and underflow of each layer, and a warning in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from fp8rl.cli import app
from fp8rl.doctor.kv_health import kv_health
from fp8rl.errors import RunDirError
from fp8rl.run_dir import Metrics, RunDir

LIMIT = 1e-3
CONFIG = {"rollout": {"precision": "fp8-kv"}, "kv_scales": {"warn_saturation": LIMIT}}


def scales(layers: int, scale: float = 2.0**-5) -> Metrics:
    return {f"kv_scale/{layer}/{x}": scale for layer in range(layers) for x in "qkv"}


def rates(layers: int, **saturation: float) -> Metrics:
    """Of every tensor none, but of those named like `k3`."""
    of = {(layer, x): saturation.get(f"{x}{layer}", 0.0) for layer in range(layers) for x in "qkv"}
    found: Metrics = {"kv/saturation_max": max(of.values())}
    for (layer, x), share in of.items():
        found |= {f"kv_saturation/{layer}/{x}": share, f"kv_underflow/{layer}/{x}": 2e-6}
    return found


def a_run(path: Path, *steps: Metrics, config: object = CONFIG) -> Path:
    run = RunDir.create(path / "run", yaml.safe_dump(config))
    for number, metrics in enumerate(steps):
        run.append({"step": number, "version": number} | metrics)
    return run.path


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "100"})


def test_each_layer_is_shown_with_what_its_scales_did(tmp_path: Path) -> None:
    counts: Metrics = {"kv/tokens": 512, "kv/changed": 1}
    odd: Metrics = {"kv_scale/11/v": 0.3}
    run = a_run(tmp_path, scales(12) | odd | counts | rates(12, k10=5e-4))
    shown = doctor(run)
    assert shown.exit_code == 0, shown.output
    assert "step 0, version 0, measured on 512 tokens; 1 of 36 differ" in shown.stdout
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["k", "2^-5", "0.05", "%", "0.0002", "%"] in lines
    assert ["v", "0.3", "0", "%", "0.0002", "%"] in lines
    numbers = [int(line[0]) for line in lines if len(line) > 1 and line[1] == "q"]
    assert numbers == list(range(12))  # in their order, not 0, 1, 10, 11, 2
    assert "All is well" in shown.stdout


def test_saturation_past_the_runs_own_threshold_warns_and_says_what_to_do(tmp_path: Path) -> None:
    run = a_run(tmp_path, scales(2) | rates(2, k1=2 * LIMIT, q0=LIMIT))
    shown = doctor(run)
    assert shown.exit_code == 1
    text = " ".join(shown.stdout.split())
    assert "clip more than 0.1 % (kv_scales.warn_saturation) of k of layer 1: raise" in text
    for remedy in ("kv_scales.margin", "more tokens", "batch just trained", "amax instead"):
        assert remedy in text
    milder = CONFIG | {"kv_scales": {"warn_saturation": 3 * LIMIT}}
    (run / "config.yaml").write_text(yaml.safe_dump(milder))
    assert doctor(run).exit_code == 0


def test_a_saturation_that_is_no_number_is_not_passed_over(tmp_path: Path) -> None:
    run = a_run(tmp_path, scales(1) | rates(1, v0=float("nan")))
    assert [(t.layer, t.tensor) for t in kv_health(run).saturated] == [(0, "v")]


def test_the_last_step_that_counted_is_shown_and_the_worst_one_told(tmp_path: Path) -> None:
    steps = [scales(1) | rates(1, k0=0.25), scales(1) | rates(1, k0=1e-4), scales(1, 1.0)]
    shown = doctor(a_run(tmp_path, *steps))  # the last version was published, and never sampled
    assert shown.exit_code == 0
    assert "of step 1, version 1" in shown.stdout
    assert "Highest saturation of all steps 25 %; the run warns above 0.1 %" in shown.stdout


def test_json_has_every_tensor_and_the_verdict(tmp_path: Path) -> None:
    shown = doctor(a_run(tmp_path, scales(2) | rates(2, v1=0.5)), "--json")
    assert shown.exit_code == 1
    found = json.loads(shown.stdout)
    assert (found["ok"], found["step"], found["version"]) == (False, 0, 0)
    assert found["warn_saturation"] == LIMIT and "v of layer 1" in found["warning"]
    assert found["tensors"][-1] == {
        "layer": 1,
        "tensor": "v",
        "scale": 2.0**-5,
        "saturation": 0.5,
        "underflow": 2e-6,
    }
    assert len(found["tensors"]) == 6


@pytest.mark.parametrize("precision", ["fp8", "fp8-kv"])
def test_the_last_probe_of_the_drift_watch_is_told(tmp_path: Path, precision: str) -> None:
    def probe(warnings: int, unexplained: float) -> Metrics:
        parts = {"own": 0.1 + unexplained, "cache": 0.1, "unexplained": unexplained}
        return {"drift/warnings": warnings, "drift/0/own": 0.1} | {
            f"drift/1/{name}": value for name, value in parts.items()
        }

    steps = [scales(2) | rates(2)] * 4 if precision == "fp8-kv" else [{}] * 4
    steps[1] = steps[1] | probe(0, 0.05)
    steps[2] = steps[2] | probe(1, 0.3)
    config = {**CONFIG, "rollout": {"precision": precision}}
    run = a_run(tmp_path, *steps, config=config)
    said = " ".join(doctor(run).stdout.split())
    assert "1 warnings of the last probe; most in layer 1, step 2: 40 % of what it adds" in said
    assert "by unexplained." in said
    drift = json.loads(doctor(run, "--json").stdout)["drift"]
    worst = {"layer": 1, "step": 2, "own": 0.4, "cause": "unexplained"}
    assert drift == {"warnings": 1, "worst": worst}
    assert kv_health(a_run(tmp_path / "quiet", scales(1) | rates(1))).drift is None


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_run_without_an_fp8_cache_says_so(tmp_path: Path, precision: str) -> None:
    config = {"rollout": {"precision": precision}}
    shown = doctor(a_run(tmp_path, {"reward/train": 0.5}, config=config))
    assert (shown.exit_code, "has no FP8 KV cache" in shown.stdout) == (0, True)


def test_a_run_without_a_step_or_without_counts_says_so(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert "No step of this run has ended yet" in doctor(run).stdout
    RunDir.open(run).append({"step": 0, "version": 0} | scales(1))
    shown = doctor(run)
    assert (shown.exit_code, "Saturation was not counted" in shown.stdout) == (0, True)
    assert "2^-5" in shown.stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("rollout: [", "config.yaml: cannot be read"),
        ("- a list", "holds a list, expected keys and values"),
        ("rollout: {precision: fp4}", "rollout.precision is 'fp4', expected one of .*'kv-only'"),
        ("rollout: {precision: fp8-kv}", "no kv_scales.warn_saturation"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, config: str, message: str) -> None:
    run = a_run(tmp_path, scales(1) | rates(1))
    (run / "config.yaml").write_text(config)
    with pytest.raises(RunDirError, match=message):
        kv_health(run)


def test_a_folder_that_holds_no_run_ends_with_one_message_and_exit_code_2(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "no", "no such run"), (tmp_path, "has no config.yaml")):
        shown = doctor(folder)
        assert shown.exit_code == 2
        assert message in shown.stderr and len(shown.stderr.splitlines()) == 1


def test_looking_at_a_run_loads_nothing_heavy(tmp_path: Path) -> None:
    run = a_run(tmp_path, scales(1) | rates(1))
    program = (
        "import sys; from fp8rl.cli import app\n"
        f"app(['doctor', {str(run)!r}], standalone_mode=False)\n"
        "sys.exit(' '.join({'torch', 'vllm', 'megatron', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
