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
from fp8rl.report.quantities import EXACT, SAMPLED, STEP, reward
from fp8rl.report.statistics import difference
from fp8rl.report.summary import result, write_comparison
from tests.fp8rl.report_runs import PageText, make_run

BF16, FP8 = {"precision": "bf16"}, {"precision": "fp8-kv"}
MACHINE = {"cpu": {"model": "A", "cores": 2}, "gpus": [], "python": "3.11"}


def a_run(
    folder: Path,
    *,
    machine: Any = None,
    loss: float = 0.2,
    exact: float | None = None,
    **config: Any,
) -> Path:
    """A run of its own seed; better by 0.01 for each seed, FP8 faster and with twice the cache.

    loss: what FP8 loses of the sampled reward. exact: the exact reward, at every evaluation.
    """
    fp8, seed = config["rollout"] == FP8, config.get("seed", 0)

    def change(step: int, line: Any) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        if "reward/heldout" in line:
            lost = loss if fp8 and step > 5 else 0.0
            changed["reward/heldout"] = line["reward/heldout"] + 0.01 * seed - lost
            if exact is not None:
                changed["reward/heldout_trainer"] = exact
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


def a_study(root: Path, *, seeds: int, **made: Any) -> list[Path]:
    """Runs as a study leaves them: seed-N in each arm's folder, each seed with its own start."""
    return [
        a_run(
            root / rollout["precision"] / f"seed-{seed}",
            rollout=rollout,
            seed=seed,
            warmup={"start_from": root / "starts" / f"abc-{seed}"},
            **made,
        )
        for rollout in (BF16, FP8)
        for seed in range(seeds)
    ]


def test_the_seeds_of_a_studys_arm_are_one_arm_though_each_has_a_start_of_its_own(
    tmp_path: Path,
) -> None:
    found = load(a_study(tmp_path, seeds=3))
    assert [arm.name for arm in found.arms] == ["BF16", "FP8 weights + KV"]
    assert [len(arm.runs) for arm in found.arms] == [3, 3]


def test_runs_are_named_by_arm_and_seed_and_not_by_their_folders(tmp_path: Path) -> None:
    paths = a_study(tmp_path, seeds=1, machine=MACHINE)
    elsewhere = a_run(
        tmp_path / "bf16/2/seed-2", machine=MACHINE | {"python": "3.12"}, rollout=BF16, seed=2
    )
    killed = make_run(tmp_path / "killed" / "seed-0", rollout=BF16, seed=6)
    killed.truncate_metrics(after_step=12)
    page = write_comparison([*paths, elsewhere, killed.path], tmp_path / "page.html")
    html = page.read_text()
    assert "BF16, seed 6 stopped at step 12 of 20" in PageText(html).text
    section = html[html.index("Where it ran") :]
    heads = re.findall(r"<th>([^<]+)</th>", section)
    assert heads == ["fact", "BF16, seed 0", "BF16, seed 2", "FP8 weights + KV, seed 0"]
    assert "Not recorded, since they have not ended: BF16, seed 6." in section
    assert not re.search(r"\bseed-\d+ stopped", html)


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
    of = reward([*bf16.runs, *fp8.runs]).of
    assert bf16.values(of) == pytest.approx({0: 0.6, 1: 0.61})  # of steps 10, 15, 20
    found = difference(fp8.values(of), bf16.values(of))
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


def said(paths: list[Path], out: Path) -> str:
    return PageText(write_comparison(paths, out).read_text()).text


@pytest.mark.parametrize(
    ("loss", "safe", "words"),
    [
        (0.01, True, "no difference that matters, for it lies within \u00b10.03"),
        (0.2, False, "it is worse"),
        (-0.2, True, "it is better"),
    ],
)
def test_a_reward_is_judged_as_in_a_study_a_loss_within_the_margin_is_none(
    tmp_path: Path, loss: float, safe: bool, words: str
) -> None:
    text = said(a_study(tmp_path, seeds=3, loss=loss), tmp_path / "page.html")
    assert f"against BF16: {words}." in text
    assert ("Not safe" not in text) == safe


def test_what_scatters_is_undecided_and_one_seed_says_nothing(tmp_path: Path) -> None:
    paths = a_study(tmp_path / "one", seeds=1)
    assert "one seed cannot say whether that is chance" in said(paths, tmp_path / "one.html")
    losses = enumerate((0.3, -0.2, 0.1))
    ours = [a_run(tmp_path / f"f{i}", rollout=FP8, seed=i, loss=loss) for i, loss in losses]
    theirs = [a_run(tmp_path / f"b{i}", rollout=BF16, seed=i) for i in range(3)]
    text = said([*ours, *theirs], tmp_path / "page.html")
    assert "undecided, for the interval holds 0 and reaches beyond" in text
    apart = [a_run(tmp_path / f"c{i}", rollout=BF16, seed=i) for i in (7, 8, 9)]
    text = said([*ours, *apart], tmp_path / "apart.html")
    assert "No seed has a held-out reward both here and in BF16." in text


def test_the_exact_reward_is_compared_where_every_run_has_it(tmp_path: Path) -> None:
    exact = [
        a_run(tmp_path / f"{rollout['precision']}-{seed}", rollout=rollout, seed=seed, exact=0.5)
        for rollout in (BF16, FP8)
        for seed in range(2)
    ]
    runs = [RunData.load(path) for path in exact]
    assert reward(runs).source.keys == (EXACT,)
    assert [reward(runs).of(run) for run in runs] == [0.5] * 4
    text = said(exact, tmp_path / "page.html")  # of the sampled reward FP8 loses 0.2
    assert "Held-out reward +0 against BF16: no difference that matters" in text
    assert "Held-out reward, exact" in text, "what is judged is drawn"
    older = a_run(tmp_path / "older", rollout=FP8, seed=2)
    assert reward([*runs, RunData.load(older)]).source.keys == (SAMPLED,)


def test_the_page_says_how_many_comparisons_it_makes(html: str, tmp_path: Path) -> None:
    text = PageText(html).text
    section = text[text.index("mean over seeds") : text.index("Curves")]
    found = re.search(r"These are (\d+) comparisons at 95 %: one in 20 is off by chance", section)
    assert found and 5 < int(found[1]) <= 9, section
    one = said(a_study(tmp_path, seeds=1), tmp_path / "page.html")
    assert "off by chance alone" not in one, "one seed has no interval"


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
    assert "BF16, seed 6 stopped at step 12 of 20" in notices
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


@pytest.mark.parametrize(
    ("out", "words"),
    [("nodir/x.html", "nodir is no folder"), (".", "is a folder; give the page's")],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_page_that_has_no_place_is_refused_before_runs_are_read(
    out: str, words: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["report", *["no/such/run"] * count, "--out", out])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert words in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_studys_folder_is_refused_with_its_page_and_how_to_compare_its_runs(
    tmp_path: Path,
) -> None:
    study = tmp_path / "study"
    for path in a_study(tmp_path / "made", seeds=1):
        place = study / "runs" / path.parent.name / path.name
        place.parent.mkdir(parents=True)
        path.rename(place)
    (study / "config.yaml").write_text("seeds: 1\n")
    (study / "result.json").write_text("{}")
    refused = CliRunner().invoke(app, ["report", str(study)])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert f"whose page is {study}/report.html" in refused.stderr
    assert f"fp8rl report {study}/runs/ARM/seed-* {study}/runs/OTHER_ARM/seed-*" in refused.stderr
