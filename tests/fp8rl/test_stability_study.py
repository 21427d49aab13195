"""A real study, small: killed in the middle, gone on with, stopped by Ctrl-C, judged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fp8rl.config.file import dump_config, load_config
from tests.fp8rl.run_helpers import PATIENCE, TINY, Command, metrics, numbers, runs

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 10
STUDY = {
    "seeds": 2,
    "last_evaluations": 2,
    "run": TINY
    | {
        "steps": STEPS,
        "eval_every": 2,
        "checkpoint_every": 2,
        "task": {
            "operations": ["reverse"],
            "min_digits": 1,
            "max_digits": 3,
            "heldout_prompts": 64,
        },
        "warmup": {"steps": 120, "batch_size": 64, "learning_rate": 2e-3, "slip_rate": 0.1},
        "trainer": {"learning_rate": 1e-5, "micro_batch_size": 32},
        "rollout": TINY["rollout"] | {"precision": "fp8"},
    },
    "arms": {
        "tis": {"title": "TIS"},
        "none": {"title": "uncorrected", "against": "tis", "changes": {"correction.stages": []}},
        "wild": {
            "title": "unlearns",
            "against": "tis",
            "changes": {"trainer.learning_rate": 1e-2},
        },
        "broken": {  # infinite weights after the first optimizer step
            "title": "has no numbers",
            "against": "tis",
            "changes": {"trainer.learning_rate": 1e30},
        },
    },
}
del STUDY["run"]["seed"]  # type: ignore[attr-defined]


class Study:
    """`fp8rl stability` in a process and session of its own."""

    def __init__(self, root: Path, *options: str) -> None:
        self.out, config = root / "out", root / "study.yaml"
        config.write_text(yaml.safe_dump(STUDY))
        self.output = root / f"{time.monotonic_ns()}.log"
        command = ["stability", str(config), f"--out={self.out}", *options]
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fp8rl", *command],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.family: set[psutil.Process] = set()

    def wait_until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def ended(self) -> list[str]:
        """Runs that have ended."""
        return sorted(f"{p.parts[-3]}/{p.parts[-2]}" for p in self.out.glob("runs/*/*/result.json"))

    def steps_of(self, arm: str) -> int:
        """Steps that the arm's runs have done."""
        return sum(len(metrics(folder)) for folder in self.out.glob(f"runs/{arm}/*"))

    def end(self) -> tuple[int, list[psutil.Process]]:
        """Exit code, and the processes that outlive it."""
        code = self.process.wait(2 * PATIENCE)
        alive = psutil.wait_procs(self.family, timeout=10)[1]
        return code, [process for process in alive if runs(process)]

    def said(self) -> str:
        return self.output.read_text()

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def test_kill_minus_9_leaves_no_process(root: Path) -> None:
    study = Study(root)
    study.wait_until(lambda: study.ended() and study.steps_of("none") + study.steps_of("tis") > 14)
    alive = [" ".join(process.cmdline()) for process in study.family if runs(process)]
    for part in ("fp8rl.stability.lane", "fp8rl.engine.process"):
        assert any(part in command for command in alive), alive
    study.process.kill()
    code, survivors = study.end()
    assert code == -signal.SIGKILL
    assert survivors == []
    assert not (study.out / "result.json").exists()


def test_ctrl_c_saves_the_runs_and_says_how_to_go_on(root: Path) -> None:
    study = Study(root)
    kept = {path: path.stat().st_mtime_ns for path in study.out.glob("runs/*/*/result.json")}
    assert kept
    done = study.steps_of("none") + study.steps_of("tis")
    study.wait_until(lambda: study.steps_of("none") + study.steps_of("tis") >= done + 2)
    os.killpg(study.process.pid, signal.SIGINT)
    code, survivors = study.end()
    assert (code, survivors) == (130, [])
    assert "go on with the same command" in study.said()
    assert "Traceback" not in study.said()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what had ended is kept"


def test_the_same_command_goes_on_to_the_end(root: Path) -> None:
    study = Study(root, "--json")
    code, survivors = study.end()
    assert (code, survivors) == (0, []), study.said()
    found = json.loads(study.said().splitlines()[-1])
    assert found == study.result()
    for arm in ("tis", "none"):
        for seed in (0, 1):
            folder = study.out / "runs" / arm / f"seed-{seed}"
            assert [line["step"] for line in metrics(folder)] == list(range(STEPS + 1))
            assert not (folder / "checkpoints").exists()
    for name in ("report.html", "stability.png", "claims.md", "config.yaml"):
        assert (study.out / name).stat().st_size > 500, name
    rows = {(row["arm"], row["seed"]): row for row in found["rows"]}
    assert len(rows) == 8 and found["unfinished"] == {}
    assert found["verdicts"]["none"]["n"] == 2
    assert abs(found["verdicts"]["none"]["difference"]) < 0.1


def test_arms_of_a_seed_begin_alike(root: Path) -> None:
    first = {
        (arm, seed): metrics(root / "out" / "runs" / arm / f"seed-{seed}")[0]
        for arm in ("tis", "none", "wild")
        for seed in (0, 1)
    }
    for key in ("reward/heldout_trainer", "reward/train", "rollout_corr/k3_kl"):
        for seed in (0, 1):
            assert len({first[arm, seed][key] for arm in ("tis", "none", "wild")}) == 1, key
        assert first["tis", 0][key] != first["tis", 1][key]


def test_a_run_that_unlearns_has_collapsed_and_one_that_breaks_too(root: Path) -> None:
    found = json.loads((root / "out" / "result.json").read_text())
    assert found["collapsed"] == {"tis": 0, "none": 0, "wild": 2, "broken": 2}
    collapses = [row["collapse"] for row in found["rows"] if row["arm"] == "wild"]
    assert all(each["found"] < each["best"] / 2 for each in collapses)
    assert all(0 < each["step"] < STEPS and each["best"] > 0.3 for each in collapses)
    broken = [row for row in found["rows"] if row["arm"] == "broken"]
    assert [row["reward"] for row in broken] == [0.0, 0.0]
    assert all(row["broke"] and row["collapse"]["found"] is None for row in broken)
    assert found["verdicts"]["broken"]["difference"] < -0.3
    page = (root / "out" / "report.html").read_text()
    assert "has no numbers" in page and broken[0]["broke"] in page


def test_a_run_in_a_lane_is_the_run_that_fp8rl_train_does(root: Path, tmp_path: Path) -> None:
    """Also where the engine had served another run before, and the lane had been killed."""
    served = "served this run"
    folders = [root / "out" / "runs" / arm / f"seed-{n}" for arm in ("tis", "none") for n in (0, 1)]
    [folder, *_] = [f for f in folders if served in (f / "engine.log").read_text()]
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(folder / "config.yaml")))
    alone = tmp_path / "alone"
    end = Command(alone, config, f"run_dir={alone}").end()
    assert end.code == 0, end.errors
    assert numbers(alone) == numbers(folder)


def test_another_study_in_the_folder_is_refused_by_name(root: Path) -> None:
    study = Study(root, "run.rollout.temperature=0.5")
    code, _ = study.end()
    assert code == 2
    assert "rollout.temperature is 1.0 there, 0.5 here" in study.said()
