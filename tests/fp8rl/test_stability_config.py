"""What a study may say, what it plans, and what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fp8rl.cli import app
from fp8rl.config.file import dump_config, load
from fp8rl.errors import ConfigError, RunDirError
from fp8rl.stability.claims import ARMS
from fp8rl.stability.command import _with_ended
from fp8rl.stability.config import StudyConfig, load_study
from fp8rl.stability.measure import measure
from fp8rl.stability.plan import Failure, Plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "stability.yaml"
STUDY: dict[str, Any] = {
    "seeds": 2,
    "run": {"steps": 4, "rollout": {"precision": "fp8"}, "warmup": {"steps": 3}},
    "arms": {
        "bf16": {"title": "BF16", "changes": {"rollout.precision": "bf16"}},
        "fp8": {"title": "FP8", "against": "bf16", "changes": {"correction.stages": []}},
        "short": {"title": "FP8", "against": "bf16", "changes": {"warmup.steps": 2}},
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def plan(path: Path, out: Path, *overrides: str) -> Plan:
    return Plan.of(load_study(path, list(overrides)), out)


def test_an_arm_is_the_shared_run_with_its_changes(path: Path) -> None:
    study = load_study(path, ["run.steps=7"])
    bf16, fp8 = study.run_config("bf16"), study.run_config("fp8")
    assert (bf16.rollout.precision, fp8.rollout.precision) == ("bf16", "fp8")
    assert (bf16.steps, fp8.steps, fp8.correction.stages) == (7, 7, ())
    assert len(bf16.correction.stages) == 1, "one arm's changes are not another's"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sedes=3", "unknown key 'sedes'; did you mean 'seeds'"),
        ("run.stpes=3", "run: unknown key 'stpes'; did you mean 'steps'"),
        ("arms.fp8.tilte=x", "unknown key 'arms.fp8.tilte'; did you mean 'title'"),
        ("arms.fp8.changes={kv_scale.margin: 2}", "arms.fp8: unknown key 'kv_scale'.*'kv_scales'"),
        ("arms.fp8.changes={steps: 0}", r"arms.fp8: steps: .*found 0"),
        ("arms.fp8.changes={seed: 3}", "arms.fp8: seed is set by the study"),
        ("run.warmup.start_from=x", "warmup.start_from is set by the study"),
        ("arms.fp8.against=bf61", "arms.fp8.against is 'bf61', expected another arm: bf16, short"),
        ("arms.fp8.against=fp8", "expected another arm"),
        ("arms.A B={title: x}", "arm 'A B': a name is a folder's"),
        ("arms.fp8.changes={trainer.tensor_parallel: 2}", "one trainer rank"),
        ("margin=0", "margin: .*greater than 0"),
    ],
)
def test_what_is_wrong_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(path, [override])


def test_a_study_is_read_back_as_it_was_written(path: Path, tmp_path: Path) -> None:
    study = load_study(path, [])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(study))
    assert load(StudyConfig, again) == study


def test_the_example_has_every_arm_that_the_claims_ask_for() -> None:
    study = load_study(EXAMPLE, [])
    assert set(study.arms) == set(ARMS)
    assert study.seeds == 5


def test_runs_of_a_seed_with_one_warm_up_share_its_start(path: Path, tmp_path: Path) -> None:
    runs = {(run.arm, run.seed): run for run in plan(path, tmp_path).runs}
    assert len(runs) == 6
    assert runs["bf16", 0].start == runs["fp8", 0].start
    assert len({run.start for run in runs.values()}) == 4, "two warm-ups, two seeds"
    assert runs["fp8", 1].config.seed == runs["fp8", 1].start_config.seed == 1
    assert runs["short", 0].start_config.warmup.steps == 2
    assert runs["fp8", 0].start_config.warmup.start_from is None


def test_runs_that_differ_in_the_loss_alone_can_have_one_engine(path: Path, tmp_path: Path) -> None:
    other = "arms.tis={title: TIS, changes: {correction.stages: [{kind: tis}]}}"
    keys = {run.arm: run.engine_key for run in plan(path, tmp_path, other).runs}
    assert keys["tis"] == keys["fp8"] != keys["bf16"]


def test_a_run_has_ended_failed_or_waits(path: Path, tmp_path: Path) -> None:
    run = plan(path, tmp_path).runs[0]
    assert run.state == "new"
    run.folder.create(run.config.run_dir, dump_config(run.config))
    assert run.state == "begun"
    run.fail(Failure("EngineDiedError", "killed", 3, numerical=False))
    assert run.state == "begun", "what the machine failed is tried again"
    run.fail(Failure("NonFiniteGradientError", "NaN", 3, numerical=True))
    assert (run.state, run.failure()) == (
        "failed",
        Failure("NonFiniteGradientError", "NaN", 3, True),
    )
    run.fail(None)
    run.folder.write_result({})
    assert (run.state, run.failure()) == ("ended", None)


def test_a_folder_of_another_study_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    first, moved = plan(path, tmp_path / "a").runs[0], plan(path, tmp_path / "b").runs[0]
    first.folder.create(first.config.run_dir, dump_config(first.config))
    first.check()
    (tmp_path / "a").rename(tmp_path / "b")
    moved.check()  # a study may be moved
    other = plan(path, tmp_path / "b", "run.trainer.learning_rate=0.5").runs[0]
    with pytest.raises(
        RunDirError, match=r"bf16/seed-0.*trainer.learning_rate is 0.0001 there, 0.5"
    ):
        other.check()


def test_arms_that_ended_as_something_else_are_refused_beside_those_asked_for(
    path: Path, tmp_path: Path
) -> None:
    for run in plan(path, tmp_path).of_arm("bf16"):
        run.folder.create(run.config.run_dir, dump_config(run.config))
        run.folder.write_result({})
    longer = load_study(path, ["run.steps=60"])
    with pytest.raises(RunDirError, match=r"bf16/seed-0.*steps is .* there, 60 here"):
        _with_ended(Plan.of(longer, plan(path, tmp_path).out, ["fp8"]))


def test_an_ended_run_without_its_evaluations_has_no_reward(path: Path, tmp_path: Path) -> None:
    run = plan(path, tmp_path).runs[0]
    run.folder.create(run.config.run_dir, dump_config(run.config))
    run.folder.append({"step": 0, "reward/heldout_trainer": 0.5})
    run.folder.write_result({})
    with pytest.raises(RunDirError, match=r"has ended, but its metrics have no reward/heldout_tr"):
        measure(run, 2)


def test_a_broken_run_is_told_after_the_study_and_is_no_usage_error(
    path: Path, tmp_path: Path
) -> None:
    for run in plan(path, tmp_path / "out").runs:
        run.folder.create(run.config.run_dir, dump_config(run.config))
        run.folder.append({"step": 0, "reward/heldout_trainer": 0.5})
        run.folder.write_result({})
    told = CliRunner().invoke(app, ["stability", str(path), f"--out={tmp_path / 'out'}"])
    assert told.exit_code == 1
    assert "seed-0: the run has ended, but its metrics have no reward/heldout" in told.output


def test_the_command_says_what_it_cannot_do_before_anything_starts(
    path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ["stability", str(path), f"--out={out}"]
    unknown = CliRunner().invoke(app, [*asked, "--arms=bf16,fp9"])
    assert unknown.exit_code == 2
    assert "no arm fp9; it has bf16, fp8, short" in unknown.output
    bench = CliRunner().invoke(app, [*asked, f"--bench={tmp_path}"])
    assert bench.exit_code == 2
    assert "no result of `fp8rl bench rollout`" in bench.output
    assert not out.exists()


def test_help_teaches_with_examples() -> None:
    shown = CliRunner().invoke(app, ["stability", "--help"], env={"COLUMNS": "120"}).output
    assert "fp8rl stability examples/stability.yaml" in shown
    assert "same command" in shown
