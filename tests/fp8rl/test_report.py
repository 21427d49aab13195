"""The report: its numbers follow from the metrics, and nothing is drawn that was not measured."""

import io
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fp8rl.config import RunConfig, dump_config
from fp8rl.environment import CPU_FEATURES, cpu_features, cpu_model, environment
from fp8rl.errors import RunDirError
from fp8rl.plots import curves, panels, phase_names
from fp8rl.report import closing_table, headline, result, write_report
from fp8rl.run_dir import RunDir

COMMAND = "fp8rl train examples/grpo.yaml 'run_dir=runs/<b>'"
LAYERS, STEPS = 4, 20


def step_metrics(step: int, rng: random.Random) -> dict[str, float | int | str]:
    metrics: dict[str, float | int | str] = {
        "step": step,
        "version": step,
        "reward/train": 0.2 + 0.75 / (1 + math.exp(8 - step)) + rng.gauss(0, 0.02),
        "rollout_corr/k3_kl": 1e-3 * math.exp(rng.gauss(0, 0.3)),
        "rollout_corr/token_mult_prob_error": 1 + 0.02 * math.exp(rng.gauss(0, 0.1)),
        "rollout_corr/rollout_is_ratio_fraction_high": 0.0008,
        "rollout_corr/rollout_rs_masked_fraction": 0.0,
        "sync/bytes": 3_456_000,
        "sync/bf16_bytes": 6_912_000,
        "sync/seconds": 0.001 * (50 + step),
        "rollout/tokens_per_second": 5000.0 + 10 * step,
        "grad_norm": math.nan if step == 3 else 0.5,
        "time/observe": 0.05,
        "time/rollout": 0.75,
        "time/train": 1.0,
        "time/step": 1.8,
    }
    for layer in range(LAYERS):
        metrics |= {f"kv_scale/{layer}/{kind}": 2.0**-layer for kind in "qkv"}
    metrics |= {"kv/saturation_max": 2e-5 if step == 7 else 0.0, "kv/changed": int(step > 18)}
    if step % 10 == 0:
        metrics |= {"reward/heldout": step / 25, "time/eval": 2.0}
    return metrics


def run_metrics() -> list[dict[str, float | int | str]]:
    rng = random.Random(0)
    start = {"step": 0, "version": 0, "reward/heldout": 0.1, "time/eval": 2.0}
    return [start, *(step_metrics(step, rng) for step in range(1, STEPS + 1))]


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path / "demo", dump_config(RunConfig(steps=STEPS)))
    for line in run_metrics():
        run.append(line)
    return run


class Page(HTMLParser):
    """The text of a page, and that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_result_follows_from_the_metrics(run):
    found = result(run, command=COMMAND, environment={"python": "3.11"})
    assert found["command"] == COMMAND
    assert found["environment"] == {"python": "3.11"}
    assert found["config"] == json.loads(RunConfig(steps=STEPS).model_dump_json())
    assert found["steps"] == STEPS
    assert (found["start_heldout_reward"], found["end_heldout_reward"]) == (0.1, 0.8)
    assert found["best_heldout_reward"] == 0.8
    assert found["sync_ms_median"] == pytest.approx(60.5)
    assert (found["sync_bytes"], found["bf16_bytes"]) == (3_456_000, 6_912_000)
    assert found["tokens_per_second_median"] == pytest.approx(5105)
    assert (found["kv_saturation_max"], found["kv_scale_changes"]) == (2e-5, 2)
    k3 = [line["rollout_corr/k3_kl"] for line in run_metrics()[1:]]
    assert found["mismatch_k3_mean"] == pytest.approx(sum(k3) / STEPS)
    # over all 21 lines, the start evaluation's too
    assert found["phase_seconds_mean"] == pytest.approx(
        {"observe": 1 / 21, "rollout": 15 / 21, "train": 20 / 21, "eval": 6 / 21}
    )
    assert found["step_seconds_mean"] == pytest.approx(1.8)
    run.write_result(found)
    assert run.read_result() == found


def test_a_run_without_a_step_has_a_result_and_a_report(tmp_path):
    run = RunDir.create(tmp_path / "demo", dump_config(RunConfig()))
    found = result(run, command=None, environment=None)
    run.write_result(found)
    assert found["steps"] == 0
    assert found["end_heldout_reward"] is None
    assert found["phase_seconds_mean"] == {}
    page = Page(write_report(run.path).read_text())
    assert "Stopped at step 0 of 100" in page.text


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(RunDirError, match="not a run folder"):
        write_report(tmp_path)


def test_the_page_is_whole_and_needs_no_network(run):
    run.write_result(result(run, command=COMMAND, environment=environment()))
    html = write_report(run.path).read_text()
    page = Page(html)
    for text in ("0.100", "0.800", "50% of BF16", "5,105 tokens/s", "60 ms", "grad_norm"):
        assert text in page.text
    assert COMMAND in page.text  # escaped: it comes back as text
    assert "micro_batch_size" in page.text
    assert cpu_model() in page.text
    assert html.count("<svg") == 6
    assert 'name="viewport"' in html
    assert not re.search(r"""(src|href)=["'](?!\#)|url\((?!\#)|@import|<script""", html)
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_a_report_of_a_run_that_was_killed_says_where_it_stopped(run):
    run.truncate_metrics(after_step=12)
    page = Page(write_report(run.path).read_text())
    assert "Stopped at step 12 of 20" in page.text
    assert "the run has not ended" in page.text


def test_the_closing_table_has_the_verdict(run):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(closing_table(result(run, command=None, environment=None)))
    shown = console.export_text()
    for text in ("0.100 -> 0.800", "50% of BF16's 6.59 MiB", "3.30 MiB", "60 ms", "5,105 tokens/s"):
        assert text in shown
    assert "0.002 %" in shown and "2 scale changes" in shown


def test_a_run_with_a_bf16_cache_has_no_saturation(tmp_path):
    run = RunDir.create(tmp_path / "demo", dump_config(RunConfig(rollout={"precision": "bf16"})))
    run.append({"step": 1, "version": 1, "reward/train": 0.5})
    found = result(run, command=None, environment=None)
    assert found["kv_saturation_max"] is found["kv_scale_changes"] is None
    assert "saturation" not in str(headline(found))


def test_every_panel_without_its_series_says_so():
    missing = [text for svg in panels([]) for text in re.findall(r">([^<>\n]{9,})</text>", svg)]
    assert "BF16 KV cache: no scales" in missing
    assert sum(text.startswith(("no ", "BF16", "mismatch", "neither")) for text in missing) == 6


def test_each_kv_scale_has_a_line_of_its_own_and_constant_ones_are_called_so():
    figure = curves(run_metrics(), "run")
    axes = next(axes for axes in figure.axes if axes.get_title("left") == "KV-cache scales")
    assert axes.get_title("right") == f"{2 * LAYERS} scales, constant in all steps"
    heights = sorted(line.get_ydata()[0] for line in axes.get_lines())
    assert len(heights) == len(set(heights)) == 2 * LAYERS
    for octave, pair in zip(range(1 - LAYERS, 1), range(0, 2 * LAYERS, 2), strict=True):
        assert [round(height) for height in heights[pair : pair + 2]] == [octave, octave]


def test_what_the_scales_clip_is_drawn_below_them_with_the_threshold():
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


def test_what_the_stacked_bars_reach_is_the_time_of_the_step():
    metrics = run_metrics()
    figure = curves(metrics, "run")
    axes = next(axes for axes in figure.axes if axes.get_title("left") == "Time per step")
    values, edges, _ = axes.patches[-1].get_data()
    tops = dict(zip(edges[:-1] + 0.5, values, strict=True))
    assert tops[5] == pytest.approx(1.8)
    assert tops[10] == pytest.approx(3.8)
    assert phase_names(metrics) == ["observe", "rollout", "train", "eval"]


def test_numbers_that_cannot_be_drawn_do_not_end_the_run(run):
    for step, value in enumerate((math.nan, math.inf, -math.inf, 0.0), start=STEPS + 1):
        broken = {key: value for key in step_metrics(1, random.Random(0)) if "/" in key}
        run.append({"step": step, "version": step, **broken})
    run.write_result(result(run, command=None, environment=None))
    page = write_report(run.path)
    Page(page.read_text())
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_environment_is_json_and_reads_the_processor(tmp_path):
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A CPU @ 2 GHz: fast\nflags\t\t: fpu avx2 avx512f\n\nx: y\n")
    assert cpu_model(cpuinfo) == "A CPU @ 2 GHz: fast"
    assert [name for name, there in cpu_features(cpuinfo).items() if there] == ["avx2", "avx512"]
    assert set(cpu_features(tmp_path / "none").values()) == {False}
    assert set(cpu_features(cpuinfo)) == set(CPU_FEATURES)
