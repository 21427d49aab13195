"""What a report shows of the drift watch: where, when, why, and the worst layer in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fp8rl.report.curves import panels
from fp8rl.report.data import RunData
from fp8rl.report.figures import svg
from fp8rl.report.glossary import UNDEFINED, definition
from fp8rl.report.summary import write_report
from fp8rl.report.verdict import judge
from fp8rl.run_dir import Metrics
from tests.fp8rl.report_runs import make_run

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


def test_a_run_without_probes_has_neither_panels_nor_picture(tmp_path: Path) -> None:
    plain, probed = make_run(tmp_path / "plain"), make_run(tmp_path / "probed", change=probe)
    for run in (plain, probed):
        write_report(run.path)
    assert not plain.drift.exists() and probed.drift.exists()
    assert TITLES[0] not in plain.report.read_text() and TITLES[0] in probed.report.read_text()


def test_every_metric_of_a_probe_is_defined() -> None:
    names = [key for key in probe(15, {}) if key != "drift/tokens"]
    names += ["drift/tokens", "drift/head", "drift/embedding", "drift/3/total", "drift/3/router"]
    assert [name for name in names if definition(name).what == UNDEFINED] == []
