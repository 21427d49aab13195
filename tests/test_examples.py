"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from fp8rl.run_dir import RunDir
from tests.fp8rl.run_helpers import runs

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_trainer_of_ones_own_learns_from_fp8_rollouts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_trainer.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [float(found) for found in re.findall(r"reward ([0-9.]+)", done.stdout)]
    assert len(rewards) == 12
    assert rewards[-1] > rewards[0] + 0.2


STUDY = (
    "--models=qwen2-outliers",
    "--arms=ones",
    "--arms=stale",
    "--steps=3",
    "--stale=2",
    "--outlier=600",
    "model.num_layers=1",
    "task.min_digits=1",
    "task.max_digits=2",
    "task.heldout_prompts=8",
    "warmup.steps=2",
    "warmup.batch_size=32",
    "trainer.learning_rate=0.001",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "rollout.kv_cache_gib=0.02",
    "kv_scales.scale_format=fp32",  # any change of a magnitude shows
)


@pytest.mark.slow
@pytest.mark.long
def test_the_study_of_kv_scales_serves_the_scales_of_each_arm_and_keeps_what_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "kv_scales.py"), *STUDY, f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "result.json").read_text())["arms"]
    assert [row["arm"] for row in rows] == ["ones", "stale-2"]
    folders = [RunDir(tmp_path / row["model"] / row["arm"] / "seed-0") for row in rows]
    ones, stale = (folder.metrics() for folder in folders)
    scales = [key for key in ones[0] if key.startswith("kv_scale/")]
    assert [{line[key] for key in scales} for line in ones] == 4 * [{1.0}]
    assert 1.0 < stale[0]["kv_scale/0/k"] < 1.4, "outliers of 300 to 600 are 448 times that"
    assert ones[0]["kv_saturation/0/k"] > 0.05 > stale[0]["kv_saturation/0/k"]
    assert rows[0]["clipped"] >= ones[0]["kv_saturation/0/k"]
    assert [line["kv/changed"] for line in stale[1:3]] == [0, 0], "versions 0 to 2 have that of 0"
    assert stale[3]["kv/changed"] > 0, "version 3 has that of 1"

    assert (tmp_path / "kv_scales.png").stat().st_size > 50_000
    written = [folder.metrics_file.stat().st_mtime_ns for folder in folders]
    monkeypatch.syspath_prepend(EXAMPLES)
    command = import_module("kv_scales").app
    again = CliRunner().invoke(command, [*STUDY, f"--out={tmp_path}"])
    assert again.exit_code == 0, again.output
    assert [folder.metrics_file.stat().st_mtime_ns for folder in folders] == written
    other = CliRunner().invoke(command, [*STUDY, f"--out={tmp_path}", "rollout.temperature=0.5"])
    assert other.exit_code == 2
    assert f"{folders[0].path}: is of another config" in other.output


RAY = [sys.executable, str(EXAMPLES / "ray_disaggregated.py")]
# step, reward, kind, bytes, versions with their shares, replicas that serve
ROW = re.compile(
    r"^ +(\d+)  (0\.\d+|1\.000)   (full|delta) +([\d,]+) \(.*?%\)  (v.*%) +([\d ]+)$", re.M
)


def test_the_ray_example_says_what_it_does() -> None:
    done = subprocess.run([*RAY, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(word in done.stdout for word in ("FSDP2", "vLLM", "--kill-step", "--address"))


@pytest.mark.long
def test_ray_restarts_a_replica_and_the_run_goes_on_without_it_and_then_with_it(
    tmp_path: Path,
) -> None:
    options = ["--steps=7", "--kill-step=2", f"--out={tmp_path}"]
    done = subprocess.run([*RAY, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = ROW.findall(done.stdout)
    steps, rewards, kinds, nbytes, versions, serving = zip(*rows, strict=True)
    assert list(map(int, steps)) == list(range(1, 8))
    assert float(rewards[-1]) > float(rewards[0]) + 0.15, "it learns"
    assert kinds == ("delta", "delta", "delta", "full", "delta", "delta", "delta")
    assert serving == ("0 1", "0", "0", "0 1", "0 1", "0 1", "0 1"), "killed in 2, back in 4"
    sizes = [int(size.replace(",", "")) for size in nbytes]
    assert max(size for size, kind in zip(sizes, kinds, strict=True) if kind == "delta") < sizes[3]
    for step, shares in enumerate(versions, start=1):
        assert set(re.findall(r"v(\d+):", shares)) <= {str(step - 1), str(step)}
    assert any(" " in shares for shares in versions), "an update landed while they were sampled"
    assert "replica 1 is back" in done.stdout
    assert "responses lived through an update" in done.stdout.splitlines()[-1]


@pytest.mark.long
def test_ctrl_c_leaves_no_process_of_the_ray_example_behind(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [*RAY, "--steps=1000", f"--out={tmp_path}"],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        ended = time.monotonic() + 300
        while not ROW.search(log.read_text()):
            assert run.poll() is None and time.monotonic() < ended, log.read_text()[-3000:]
            time.sleep(0.5)
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) > 6, "Ray, two trainers, two replicas, two engines"
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        waited_for = psutil.wait_procs(family, timeout=30)[1]
        assert [process for process in waited_for if runs(process)] == []
    finally:
        run.kill()


def test_the_picture_of_bias_shows_what_enumeration_gives(tmp_path: Path) -> None:
    import torch

    bias = import_module("examples.correction_bias")
    chain = bias.Chain()
    noise = torch.randn(chain.logits.shape, generator=chain.generator, dtype=torch.float64)
    found = {
        name: chain.estimate(chain.logits + 0.3 * noise, stages)
        for name, stages in bias.LISTS.items()
    }
    assert found["TIS of sequences, cap 1e8"][0] < 1e-6, "untruncated sequence weights are exact"
    assert found["TIS of sequences, cap 2"][0] < found["TIS of tokens, cap 2"][0]
    assert found["TIS of tokens, cap 2"][0] < found["no correction"][0]
    assert all(error > of_bias for of_bias, error in found.values()), "a batch adds its noise"
