"""The report of one run: its numbers follow from the metrics, and nothing that was not measured."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
from pathlib import Path

import pytest
from rich.console import Console

from fp8rl.config.file import dump_config
from fp8rl.config.run import RunConfig
from fp8rl.environment import CPU_FEATURES, cpu_features, cpu_model, environment
from fp8rl.errors import RunDirError
from fp8rl.report.curves import curves, panels, phase_names
from fp8rl.report.data import RunData
from fp8rl.report.figures import svg
from fp8rl.report.run_page import run_page
from fp8rl.report.summary import closing_table, headline, result, write_report
from fp8rl.run_dir import RunDir
from tests.fp8rl.report_runs import (
    COMMAND,
    LAYERS,
    STEPS,
    PageText,
    make_run,
    run_metrics,
    step_metrics,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "demo")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that has ended."""
    run = make_run(tmp_path_factory.mktemp("html") / "demo")
    run.write_result(result(run, command=COMMAND, environment=environment()))
    page = write_report(run.path)
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    return page.read_text()


def test_the_result_follows_from_the_metrics(run: RunDir) -> None:
    found = result(run, command=COMMAND, environment={"python": "3.11"})
    assert found["command"] == COMMAND
    assert found["environment"] == {"python": "3.11"}
    assert found["config"] == json.loads(RunConfig(steps=STEPS).model_dump_json())
    assert found["steps"] == STEPS
    assert found["verdict"]["word"] == "Safe"
    assert (found["start_heldout_reward"], found["end_heldout_reward"]) == (0.1, 0.8)
    assert found["best_heldout_reward"] == 0.8
    assert found["sync_ms_median"] == pytest.approx(60)
    assert (found["sync_bytes"], found["bf16_bytes"]) == (3_456_000, 6_912_000)
    assert found["tokens_per_second_median"] == pytest.approx(5105)
    assert (found["kv_saturation_max"], found["kv_scale_changes"]) == (2e-5, 2)
    assert found["kv_cache_tokens"] == 4096
    k3 = [line["rollout_corr/k3_kl"] for line in run_metrics()[1:]]
    assert found["mismatch_k3_mean"] == pytest.approx(sum(k3) / STEPS)
    # over all 21 lines, the start evaluation's too
    assert found["phase_seconds_mean"] == pytest.approx(
        {"observe": 1 / 21, "rollout": 15 / 21, "train": 20 / 21, "eval": 10 / 21}
    )
    assert found["step_seconds_mean"] == pytest.approx(1.8)
    run.write_result(found)
    assert run.read_result() == found


def test_a_run_without_a_step_has_a_result_and_a_report(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "demo", dump_config(RunConfig()))
    found = result(run, command=None, environment=None)
    run.write_result(found)
    assert found["steps"] == 0
    assert found["end_heldout_reward"] is None
    assert found["phase_seconds_mean"] == {}
    text = PageText(write_report(run.path).read_text()).text
    assert "Stopped at step 0 of 100" in text
    assert "Not enough data" in text


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a run folder"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 0\nrollout: {precision: fp8}\n")
    with pytest.raises(RunDirError, match="has no section trainer, task, correction"):
        write_report(tmp_path)


def test_the_page_is_whole_and_needs_no_network(html: str) -> None:
    page = PageText(html)
    for text in ("Safe", "0.10 to 0.80", "50 %", "5,105 tokens/s", "median update 60 ms"):
        assert text in page.text
    assert COMMAND in page.text  # escaped: it comes back as text
    assert "micro_batch_size" in page.text
    assert cpu_model() in page.text
    assert html.count("<svg") == 8
    assert 'name="viewport"' in html
    assert not re.search(r"""(src|href)=["'](?!\#|data:)|url\((?!\#)|@import|<script""", html)


def test_the_page_carries_its_metrics(html: str) -> None:
    coded = re.search(r'download="metrics.json" href="data:application/json;base64,([^"]+)"', html)
    assert coded
    carried = json.loads(base64.b64decode(coded[1]))
    lines = run_metrics()
    assert carried["step"] == list(range(STEPS + 1))
    assert carried["rollout_corr/k3_kl"] == [line.get("rollout_corr/k3_kl") for line in lines]


def test_every_number_says_where_it_comes_from(html: str) -> None:
    facts = re.findall(r'<details class="(?:fact|check [a-z]+)">.*?</details>', html, re.DOTALL)
    assert len(facts) == 4 + 9  # what it bought, the checks
    for fact in facts:
        assert "<dt>means</dt>" in fact and "metrics.jsonl</code>" in fact, fact
    assert len(re.findall(r"where this is from</summary><dl>", html)) == 8
    keys = {key for line in run_metrics() for key in line} - {"step", "version"}
    for key in keys:
        assert f'<details class="why"><summary>{key}</summary><dl><dt>means</dt>' in html


def test_a_report_of_a_run_that_was_killed_says_where_it_stopped(run: RunDir) -> None:
    run.truncate_metrics(after_step=12)
    text = PageText(run_page(RunData.load(run.path))).text
    assert "Stopped at step 12 of 20" in text
    assert "the run has not ended" in text


def test_the_closing_table_has_the_verdict(run: RunDir) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(closing_table(result(run, command=None, environment=None)))
    shown = console.export_text()
    for text in ("0.100 -> 0.800", "50% of BF16's 6.59 MiB", "3.30 MiB", "60 ms", "5,105 tokens/s"):
        assert text in shown
    assert "0.002 %" in shown and "2 scale changes" in shown
    assert "Safe" in shown and "9 of 9 checks passed" in shown


def test_a_run_with_a_bf16_cache_has_no_saturation(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "demo", dump_config(RunConfig(rollout={"precision": "bf16"})))
    run.append({"step": 1, "version": 1, "reward/train": 0.5})
    found = result(run, command=None, environment=None)
    assert found["kv_saturation_max"] is found["kv_scale_changes"] is None
    assert "saturation" not in str(headline(found))


def test_every_panel_without_its_series_says_so() -> None:
    drawn = "".join(svg(panel.figure, panel.title) for panel in panels([]))
    texts = re.findall(r">([^<>\n]{9,})</text>", drawn)
    assert "BF16 KV cache: no scales" in texts
    said = ("no ", "BF16", "mismatch", "neither", "entropy")
    assert sum(text.startswith(said) for text in texts) == 8


def test_router_agreement_has_a_panel_where_a_run_measured_it() -> None:
    line = step_metrics(1, random.Random(0)) | {"router/agreement": 0.9}
    assert [p.title for p in panels([line])][-1] == "Router agreement"


def test_each_kv_scale_has_a_line_of_its_own_and_constant_ones_are_called_so() -> None:
    figure = curves(run_metrics(), "run")
    axes = next(axes for axes in figure.axes if axes.get_title("left") == "KV-cache scales")
    assert axes.get_title("right") == f"{2 * LAYERS} scales, constant in all steps"
    heights = sorted(line.get_ydata()[0] for line in axes.get_lines())
    assert len(heights) == len(set(heights)) == 2 * LAYERS
    for octave, pair in zip(range(1 - LAYERS, 1), range(0, 2 * LAYERS, 2), strict=True):
        assert [round(height) for height in heights[pair : pair + 2]] == [octave, octave]


def test_what_the_scales_clip_is_drawn_below_them_with_the_threshold() -> None:
    figure = curves(run_metrics(), "run", warn_saturation=1e-3)
    scales = next(axes for axes in figure.axes if axes.get_title("left") == "KV-cache scales")
    [right] = [axes for axes in figure.axes if axes.get_ylabel().startswith("clipped")]
    clipped, threshold = right.get_lines()
    assert dict(zip(*clipped.get_data(), strict=True))[7] == 2e-5
    assert list(threshold.get_ydata()) == [1e-3, 1e-3]
    figure.canvas.draw()
    highest = right.transData.transform((0, 1.0))[1]  # all elements clipped
    lowest = min(scales.transData.transform((0, min(line.get_ydata())))[1] for line in scales.lines)
    assert highest < lowest
    assert all(axes.get_ylabel() != "clipped, at most" for axes in curves([], "none").axes)


def test_what_the_stacked_bars_reach_is_the_time_of_the_step() -> None:
    metrics = run_metrics()
    figure = curves(metrics, "run")
    axes = next(axes for axes in figure.axes if axes.get_title("left") == "Time per step")
    values, edges, _ = axes.patches[-1].get_data()
    tops = dict(zip(edges[:-1] + 0.5, values, strict=True))
    assert tops[4] == pytest.approx(1.8)
    assert tops[10] == pytest.approx(3.8)
    assert phase_names(metrics) == ["observe", "rollout", "train", "eval"]


def test_numbers_that_cannot_be_drawn_do_not_end_the_run(run: RunDir) -> None:
    for step, value in enumerate((math.nan, math.inf, -math.inf, 0.0), start=STEPS + 1):
        broken = {key: value for key in step_metrics(1, random.Random(0)) if "/" in key}
        run.append({"step": step, "version": step, **broken})
    run.write_result(result(run, command=None, environment=None))
    PageText(write_report(run.path).read_text())
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_the_environment_is_json_and_reads_the_processor(tmp_path: Path) -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A CPU @ 2 GHz: fast\nflags\t\t: fpu avx2 avx512f\n\nx: y\n")
    assert cpu_model(cpuinfo) == "A CPU @ 2 GHz: fast"
    assert [name for name, there in cpu_features(cpuinfo).items() if there] == ["avx2", "avx512"]
    assert set(cpu_features(tmp_path / "none").values()) == {False}
    assert set(cpu_features(cpuinfo)) == set(CPU_FEATURES)
