"""Several runs side by side: what is an arm, what is compared with what, what is refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fp8rl.cli import app
from fp8rl.errors import RunDirError
from fp8rl.report.comparison import BASELINE_COLOUR, Comparison, compare
from fp8rl.report.data import RunData
from fp8rl.report.overlay import overlays
from fp8rl.report.quantities import REWARD, STEP
from fp8rl.report.statistics import difference
from fp8rl.report.summary import result, write_comparison
from tests.fp8rl.report_runs import PageText, make_run

BF16, FP8 = {"precision": "bf16"}, {"precision": "fp8-kv"}
MACHINE = {"cpu": {"model": "A", "cores": 2}, "gpus": [], "python": "3.11"}


def a_run(folder: Path, *, machine: Any = None, **config: Any) -> Path:
    """A run of its own seed; better by 0.01 for each seed, FP8 faster and with twice the cache."""
    fp8, seed = config["rollout"] == FP8, config.get("seed", 0)

    def change(step: int, line: Any) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        if "reward/heldout" in line:
            lost = 0.2 if fp8 and step > 5 else 0.0
            changed["reward/heldout"] = line["reward/heldout"] + 0.01 * seed - lost
        if step:
            changed["rollout/tokens_per_second"] = (6000.0 if fp8 else 5000.0) + seed
            changed["rollout/kv_cache_tokens"] = 8192 if fp8 else 4096
            changed["sync/bytes"] = 3_456_000 if fp8 else 6_912_000
        return changed

    run = make_run(folder, change=change, **config)
    if machine is not None:
        run.write_result(result(run, command=f"fp8rl train {folder.name}", environment=machine))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of FP8, then two of BF16."""
    root = tmp_path_factory.mktemp("arms")
    return [
        a_run(root / f"{rollout['precision']}-{seed}", machine=MACHINE, rollout=rollout, seed=seed)
        for rollout in (FP8, BF16)
        for seed in (0, 1)
    ]


def load(paths: list[Path]) -> Comparison:
    return compare([RunData.load(path) for path in paths])


@pytest.fixture(scope="module")
def html(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "comparison.html"
    return write_comparison(runs, out).read_text()


def test_runs_that_differ_in_their_seed_alone_are_one_arm_and_bf16_is_the_baseline(
    runs: list[Path],
) -> None:
    found = load(runs)
    assert [arm.name for arm in found.arms] == ["FP8 weights + KV", "BF16"]
    assert [len(arm.runs) for arm in found.arms] == [2, 2]
    assert found.baseline.name == "BF16" and found.baseline.colour == BASELINE_COLOUR
    assert len({arm.colour for arm in found.arms}) == 2


def test_without_bf16_the_first_run_is_the_baseline_and_arms_are_named_by_what_differs(
    tmp_path: Path,
) -> None:
    first = a_run(tmp_path / "a", rollout=FP8)
    other = a_run(tmp_path / "b", rollout=FP8, trainer={"learning_rate": 0.5})
    third = a_run(tmp_path / "c", rollout=FP8, correction={"stages": []})
    found = load([first, other, third])
    assert found.baseline is found.arms[0]
    assert [arm.name for arm in found.arms] == [
        "FP8 weights + KV",
        "FP8 weights + KV, trainer.learning_rate=0.5",
        "FP8 weights + KV, correction.stages=[]",
    ]


def test_a_key_that_an_older_run_has_not_is_taken_at_its_default(tmp_path: Path) -> None:
    new, old = (a_run(tmp_path / name, rollout=FP8, seed=i) for i, name in enumerate("ab"))
    config = (old / "config.yaml").read_text()
    older = re.sub(r"  segment_tokens: .*\n|  weight_decay: .*\n", "", config)
    assert len(older) < len(config)
    (old / "config.yaml").write_text(older)
    assert len(load([new, old]).arms) == 1


def test_other_tasks_and_the_same_run_twice_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    other = a_run(tmp_path / "a", rollout=BF16, task={"max_digits": 7})
    with pytest.raises(RunDirError, match=r"different tasks.*task.max_digits: 5 and 7"):
        load([runs[0], other])
    with pytest.raises(RunDirError, match="same configuration and seed 0; give one"):
        load([runs[0], runs[0]])


def test_rewards_are_compared_at_the_end_and_paired_by_seed(runs: list[Path]) -> None:
    fp8, bf16 = load(runs).arms
    assert bf16.values(REWARD.of) == pytest.approx({0: 0.6, 1: 0.61})  # of steps 10, 15, 20
    found = difference(fp8.values(REWARD.of), bf16.values(REWARD.of))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.2, -0.2))
    assert fp8.values(STEP.of) == pytest.approx({0: -0.2 + 1.6, 1: -0.2 + 1.6})  # without eval


def test_the_page_says_what_it_cost_and_what_it_bought(html: str) -> None:
    page = PageText(html)
    assert "FP8 weights + KV against BF16" in page.text
    assert "Not safe" in page.text
    assert "Held-out reward -0.2 (-0.2 to -0.2) against BF16: it is worse." in page.text
    for fact in ("2.00\u00d7KV cache, tokens", "0.50\u00d7bytes", "1.20\u00d7rollout tokens/s"):
        assert fact in page.text
    assert "6,000, BF16 5,000" in page.text  # 6000.5 rounds to even
    assert not re.search(r"""(src|href)=["'](?!\#|data:)|url\((?!\#)|@import|<script""", html)


def test_the_page_shows_only_the_keys_that_differ_and_carries_all_metrics(html: str) -> None:
    section = html[html.index("configured differently") : html.index("Checks of each run")]
    assert re.findall(r"<tr><td>([^<]+)</td>", section) == ["rollout.precision"]
    coded = re.search(r'href="data:application/json;base64,([^"]+)"', html)
    assert coded
    carried = json.loads(base64.b64decode(coded[1]))
    assert [run["arm"] for run in carried] == ["FP8 weights + KV"] * 2 + ["BF16"] * 2
    assert carried[2]["metrics"]["rollout/kv_cache_tokens"][1] == 4096


def test_other_machines_and_unfinished_runs_are_said_first(
    tmp_path: Path, runs: list[Path]
) -> None:
    gpus = MACHINE | {"gpus": [{"name": "H100"}], "python": "3.12"}
    elsewhere = a_run(tmp_path / "gpu", machine=gpus, rollout=BF16, seed=5)
    killed = make_run(tmp_path / "killed", rollout=BF16, seed=6)
    killed.truncate_metrics(after_step=12)
    page = write_comparison([runs[0], elsewhere, killed.path], tmp_path / "page.html")
    text = PageText(page.read_text()).text
    notices = text[: text.index("Is FP8 safe here?")]
    assert "killed stopped at step 12 of 20" in notices
    assert "not made on one machine (gpus differ)" in notices


def test_every_arm_has_a_line_for_each_seed_and_a_band_around_their_mean(runs: list[Path]) -> None:
    panels = {panel.title: panel.figure.axes[0] for panel in overlays(load(runs).arms)}
    assert "Entropy of the policy" not in panels  # nobody measured it
    reward = panels["Held-out reward"]
    assert len(reward.get_lines()) == 2 * 3 and len(reward.collections) == 2
    assert [text.get_text() for text in reward.texts] == ["FP8 weights + KV", "BF16"]
    _, _, mean = reward.get_lines()[3:]
    assert list(mean.get_ydata()) == pytest.approx([0.105, 0.205, 0.405, 0.605, 0.805])
    assert panels["Mismatch KL (k3)"].get_yscale() == "log"


def test_the_command_writes_where_it_is_told_and_says_so(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = [str(path) for path in (runs[0], runs[2])]
    ended = CliRunner().invoke(app, ["report", *two])
    assert (ended.exit_code, ended.stdout) == (0, "comparison.html\n")
    assert (tmp_path / "comparison.html").is_file()
    ended = CliRunner().invoke(app, ["report", two[0], "--out", "one.html"])
    assert (ended.exit_code, ended.stdout) == (0, "one.html\n")
    assert "What it bought" in (tmp_path / "one.html").read_text()
    refused = CliRunner().invoke(app, ["report", two[0], two[0]])
    assert refused.exit_code == 2 and "give one of them" in refused.stderr
