"""What a report shows of the drift watch: where, when, why, and the worst layer in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.colors import to_rgba

from fp8rl.plots import VERMILION
from fp8rl.report.curves import panels
from fp8rl.report.data import RunData
from fp8rl.report.drift import worst_layer
from fp8rl.report.figures import svg
from fp8rl.report.gains import gains
from fp8rl.report.glossary import UNDEFINED, definition
from fp8rl.report.summary import headline, result, write_comparison, write_report
from fp8rl.report.verdict import judge
from fp8rl.run_dir import Metrics
from tests.fp8rl.report_runs import PageText, make_run

WHY = "0.4 of what the layer adds is unexplained in layer 2"
TITLES = ["Drift of each layer", "Unexplained drift", "Where drift comes from"]


def probe(step: int, line: Mapping[str, object]) -> Metrics:
    """Every fifth step; layer 2 has a fault from step 15 on."""
    if step % 5:
        return {}
    found: Metrics = {"drift/tokens": 500, "drift/logprob": 0.01, "drift/warnings": 0}
    for layer in range(4):
        parts = {"weights": 0.03, "cache": 0.04, "unexplained": 0.01, "own": 0.05}
        if layer == 2 and step >= 15:
            parts |= {"unexplained": 0.4, "own": 0.4 + step / 1000}
            found["drift/warnings"] = 1
        found |= {f"drift/{layer}/{name}": value for name, value in parts.items()}
    return found


def test_the_check_names_the_worst_layer_its_step_and_its_source(tmp_path: Path) -> None:
    run = RunData.load(make_run(tmp_path / "run", change=probe).path)
    [check] = [check for check in judge(run).checks if check.name == "Drift warnings"]
    assert check.state == "watch"
    assert check.found == (
        "2 in 5 probes; most in layer 2, step 20: 42 % of what it adds, by unexplained"
    )


def test_layers_and_probes_are_maps_and_the_worst_cell_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", change=probe)
    drawn = list(panels(run.metrics()))
    assert [panel.title for panel in drawn][-3:] == TITLES
    maps = drawn[-3:-1]
    assert [panel.note for panel in maps] == ["layer 2, step 20: 42.0%", "layer 2, step 15: 40.0%"]
    for panel in maps:
        [mesh] = panel.figure.axes[0].collections
        assert mesh.get_array().shape == (4, 5), "layers by probes"
        assert "<image" in svg(panel.figure, panel.title), "one picture, not a path for each cell"
    assert len(drawn[-1].figure.axes[0].get_lines()) == 3, "what was not measured has no line"


def broken(step: int, line: Mapping[str, object]) -> Metrics:
    """The same; in layers 1 and 3 nothing is a number at step 10, and layer 0 adds nothing."""
    found = probe(step, line)
    if step == 10:
        found |= {f"drift/{n}/{name}": math.nan for n in (1, 3) for name in ("own", "unexplained")}
    return found | {key: 0.0 for key in found if key.startswith("drift/0/")}


def test_a_layer_that_is_no_number_is_the_worst_whatever_comes_before_or_after(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", change=broken)
    for lines in (run.metrics(), run.metrics()[::-1]):
        worst = worst_layer(lines)
        assert worst is not None
        assert worst.words == "layer 1, step 10: NaN, by unexplained"


def test_in_a_map_what_is_no_number_has_a_colour_of_its_own_and_0_is_blank(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", change=broken)
    for panel in list(panels(run.metrics()))[-3:-1]:
        assert panel.note == "layer 1, step 10: NaN"
        [mesh] = panel.figure.axes[0].collections
        painted = mesh.to_rgba(mesh.get_array())
        assert tuple(painted[1, 2]) == tuple(painted[3, 2]) == to_rgba(VERMILION)
        assert (painted[0, :, 3] == 0).all() and (painted[1:, :, 3] == 1).all()
        assert not any(tuple(c) == to_rgba(VERMILION) for c in painted[2])


def fell_back(step: int, line: Mapping[str, object]) -> Metrics:
    """The same, and for layer 2 the weights are BF16 from step 16 on, and there is no fault."""
    told: Metrics = {"drift/precision": "fp8-kv" if step < 16 else "kv-only"}
    told |= {"drift/fall_back": WHY} if step == 15 else {}
    return told | (probe(0, line) | told if step == 20 else probe(step, line))


def test_a_run_that_fell_back_says_so_wherever_it_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", change=fell_back)
    data, found = RunData.load(run.path), result(run, command=None, environment=None)
    assert found["fell_back"] == [{"step": 16, "precision": "kv-only", "why": WHY}]
    assert (found["precision"], data.precision) == ("kv-only", "fp8-kv")
    [check] = [check for check in judge(data).checks if check.name == "Drift warnings"]
    assert check.found.endswith("by unexplained; kv-only from step 16 on")
    assert ("fell back", "kv-only from step 16 on", WHY) in headline(found)
    write_report(run.path)
    told = f"From step 16 on, for good: BF16 weights, FP8 KV cache. Why: {WHY}."
    assert told in PageText(run.report.read_text()).text
    other = make_run(tmp_path / "other", rollout={"precision": "bf16"})
    page = write_comparison([run.path, other.path], tmp_path / "both.html")
    assert f"FP8 weights + KV, seed 0: {told}" in PageText(page.read_text()).text
    for panel in list(panels(run.metrics()))[-3:]:
        [mark] = [x for x in panel.figure.axes[0].get_lines() if x.get_label() == "-> kv-only"]
        assert list(mark.get_xdata()) == [15.5, 15.5]


def test_what_a_cache_holds_is_told_in_the_precision_that_it_ended_in(tmp_path: Path) -> None:
    change = {"cache": "fp8", "weights": "kv-only"}
    for name, after in change.items():
        run = make_run(
            tmp_path / name,
            change=lambda step, line, after=after: (
                {  # type: ignore[misc]
                    "drift/precision": "fp8-kv" if step < 5 else after
                }
                | ({"drift/fall_back": WHY} if step == 4 else {})
            ),
        )
        first = gains(RunData.load(run.path))[0]
        assert ("2\u00d7" in first.number) == (after == "kv-only"), first
        assert "how many times: by arithmetic" in first.source.reference


def test_a_run_without_probes_has_neither_panels_nor_picture(tmp_path: Path) -> None:
    plain, probed = make_run(tmp_path / "plain"), make_run(tmp_path / "probed", change=probe)
    for run in (plain, probed):
        write_report(run.path)
    assert not plain.drift.exists() and probed.drift.exists()
    assert TITLES[0] not in plain.report.read_text() and TITLES[0] in probed.report.read_text()


def test_every_metric_of_a_probe_is_defined() -> None:
    names = [key for key in probe(15, {}) if key != "drift/tokens"]
    names += ["drift/tokens", "drift/head", "drift/embedding", "drift/3/total", "drift/3/router"]
    names += ["drift/precision", "drift/fall_back"]
    assert [name for name in names if definition(name).what == UNDEFINED] == []
