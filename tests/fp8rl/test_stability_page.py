"""What a study leaves for people: result.json, page, picture, table; from run folders alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fp8rl.config.file import dump_config
from fp8rl.stability.config import load_study
from fp8rl.stability.page import write_page
from fp8rl.stability.picture import write_picture
from fp8rl.stability.plan import Failure, Plan, StudyRun
from fp8rl.stability.result import Result

STEPS = 20
STUDY = {
    "seeds": 3,
    "last_evaluations": 2,
    "run": {"steps": STEPS, "eval_every": 5},
    "arms": {
        "bf16": {"title": "BF16 <baseline>", "changes": {"rollout.precision": "bf16"}},
        "fp8": {"title": "uncorrected", "against": "bf16"},
        "fp8-tis": {"title": "corrected", "against": "bf16"},
        "short": {"title": "of a few steps", "against": "bf16", "judged": False},
    },
}
LEVELS = {"bf16": 0.8, "fp8": 0.8, "fp8-tis": 0.79, "short": 0.1}


def line(run: StudyRun, step: int) -> dict[str, float | int | str]:
    """A step of a made-up run: rewards rise; those of arm fp8 are lost after step 10."""
    rises = (LEVELS[run.arm] + 0.01 * run.seed) * (1 - math.exp(-(step + 1) / 3))
    lost = run.arm == "fp8" and step > 10
    made: dict[str, float | int | str] = {"step": step}
    if step % 5 == 0:
        value = 0.05 + 0.01 * run.seed if lost else rises
        made |= {"reward/heldout_trainer": value, "reward/heldout": value}
    if step < STEPS:
        made |= {
            "rollout_corr/k3_kl": 1e-5 if run.arm == "bf16" else 1e-3 * (1 + 0.1 * run.seed),
            "rollout_corr/token_mult_prob_error": (1.9 if run.seed else math.inf) if lost else 1.01,
            "rollout_corr/rollout_is_ratio_fraction_high": 0.01,
            "grad_norm": 0.4,
            "policy/entropy": 1.0,
        }
    return made


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A study whose uncorrected arm collapses with seed 0 and 1, and breaks with seed 2."""
    root = tmp_path_factory.mktemp("study")
    (root / "study.yaml").write_text(yaml.safe_dump(STUDY))
    plan = Plan.of(load_study(root / "study.yaml", []), root / "out")
    for run in plan.runs:
        run.folder.create(run.config.run_dir, dump_config(run.config))
        breaks = run.arm == "fp8" and run.seed == 2
        for step in range(9 if breaks else STEPS + 1):
            run.folder.append(line(run, step))
        if breaks:
            run.fail(
                Failure("NonFiniteGradientError", "the gradient norm is nan", 8, numerical=True)
            )
        else:
            run.folder.write_result({})
    return Result.of(plan)


@pytest.fixture(scope="module")
def written(result: Result) -> dict[str, Any]:
    found = result.write("fp8rl stability study.yaml")
    write_picture(result)
    write_page(result, found)
    return found


def test_the_result_says_what_became_of_each_arm(written: dict[str, Any], result: Result) -> None:
    assert json.loads((result.plan.out / "result.json").read_text()) == json.loads(
        json.dumps(written)
    )
    assert written["verdicts"]["fp8"]["word"] == "worse"
    assert written["verdicts"]["fp8-tis"]["word"] == "same"
    assert written["verdicts"]["fp8-tis"]["difference"] == pytest.approx(-0.01, abs=1e-3)
    assert written["collapsed"] == {"bf16": 0, "fp8": 3, "fp8-tis": 0, "short": 0}
    assert "short" not in written["verdicts"], "is not judged, however bad it is"
    assert len(written["rows"]) == 12
    [tis, *_] = written["claims"]
    assert tis["answer"] == "reproduced"


def test_an_arm_collapses_only_where_its_baseline_does_less(result: Result) -> None:
    assert result.collapses("fp8") and not result.collapses("fp8-tis")
    both = replace(result, rows=dict(result.rows) | {"bf16": result.rows["fp8"]})
    assert len(both.collapsed("fp8")) == 3 and not both.collapses("fp8")


def test_the_reward_is_of_the_last_evaluations_and_0_where_numbers_broke(
    written: dict[str, Any],
) -> None:
    rows = {(row["arm"], row["seed"]): row for row in written["rows"]}
    assert rows["fp8", 1]["reward"] == pytest.approx(0.06)
    assert rows["fp8", 2]["reward"] == 0
    assert rows["fp8", 2]["broke"] == "NonFiniteGradientError at step 8"
    heights = [0.8 * (1 - math.exp(-(step + 1) / 3)) for step in (0, 5, 10, 15, 20)]
    assert rows["bf16", 0]["reward"] == pytest.approx(sum(heights[-2:]) / 2)
    area = sum(heights) / 4 - (heights[0] + heights[-1]) / 8  # the trapezoid rule
    assert rows["bf16", 0]["area"] == pytest.approx(area)


def test_a_collapse_says_what_came_first(written: dict[str, Any]) -> None:
    found = {r["seed"]: r["collapse"] for r in written["rows"] if r["arm"] == "fp8"}
    assert (found[0]["step"], found[0]["best_step"]) == (15, 10)
    assert found[0]["why"].startswith("mismatch first, at step 12: inf")
    assert found[0]["causes"][0]["value"] == "inf", "JSON has no infinity"
    assert found[1]["why"].startswith("mismatch first, at step 12: 1.9")
    assert (found[2]["step"], found[2]["found"]) == (8, None)


def test_the_page_answers_first_and_needs_no_network(
    written: dict[str, Any], result: Result
) -> None:
    text = (result.plan.out / "report.html").read_text()
    assert text.index("It depends on the arm") < text.index("Worse, or collapsed: uncorrected")
    assert "As good as BF16: corrected" in text
    assert "BF16 &lt;baseline&gt;" in text and "<baseline>" not in text
    assert "NonFiniteGradientError at step 8" in text and "mismatch first" in text
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(v or "" for k, v in attrs if k in ("src", "href") and tag != "use")

    Links().feed(text)
    assert links and all(link.startswith(("data:", "#")) for link in links)


def test_the_picture_and_the_table_show_every_arm(written: dict[str, Any], result: Result) -> None:
    assert (result.plan.out / "stability.png").stat().st_size > 50_000
    console = Console(width=140, record=True, file=(result.plan.out / "table.txt").open("w"))
    console.print(result.table())
    shown = console.export_text()
    assert "uncorrected" in shown and "3/3" in shown and "worse" in shown


def test_a_run_that_has_not_ended_is_missing_and_named(result: Result, tmp_path: Path) -> None:
    plan = Plan.of(result.plan.study, tmp_path, ["bf16"])
    found = Result.of(plan)
    assert found.unfinished == {f"bf16, seed {seed}": "it is new" for seed in range(3)}
    assert found.rows == {"bf16": []} and found.verdicts == {}
