"""The HTML of a report: one self-contained page, no network, readable on a phone.

The verdict's numbers come first, then the panels (SVG, inline), then tables of phases and metrics,
the configuration, the environment and the command. Only ``report.py`` uses this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from fp8rl.plots import PHASE_COLOURS, panels

if TYPE_CHECKING:
    from fp8rl.run_dir import Metrics

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1120px; color: #1c1c1c; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 4px; font-size: 1.4rem; } h2 { margin: 36px 0 8px; font-size: 1.1rem; }
.dim { color: #5c5c5c; font-size: .9rem; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr));
         margin: 16px 0; }
.tile { border: 1px solid #ddd; border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.plots svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
td, th { padding: 3px 16px 3px 0; text-align: right; border-bottom: 1px solid #eee; }
td:first-child, th:first-child { text-align: left; }
td i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
pre { overflow-x: auto; padding: 12px; border-radius: 8px; background: #f5f5f5; font-size: .85rem; }
"""


def page(
    title: str,
    found: Mapping[str, Any],
    headline: Sequence[tuple[str, str, str]],
    metrics: Sequence[Metrics],
    warn_saturation: float | None,
) -> str:
    """The whole page, from a ``report.result``, its headline, the run's metrics and threshold."""
    planned = found["config"]["steps"]
    state = "" if found["steps"] >= planned else f" Stopped at step {found['steps']} of {planned}."
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="dim">fp8rl run, {found["steps"]} steps.{state}</div>',
        '<div class="tiles">',
        *(_tile(*row) for row in headline),
        '</div><div class="plots">',
        *panels(metrics, warn_saturation),
        "</div>",
        "<h2>Time per phase</h2>",
        _phase_table(found["phase_seconds_mean"]),
        "<h2>Metrics</h2>",
        _metrics_table(metrics),
        "<h2>Command</h2>",
        _code(found["command"] or "not recorded: the run has not ended"),
        "<h2>Environment</h2>",
        _yaml(found["environment"] or "not recorded: the run has not ended"),
        "<h2>Configuration</h2>",
        _yaml(found["config"]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fp8rl: {escape(title)}</title>\n<style>{CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _tile(what: str, number: str, remark: str) -> str:
    number = escape(number).replace("-&gt;", "&rarr;")
    return (
        f'<div class="tile">{escape(what)}<b>{number}</b>'
        f'<span class="dim">{escape(remark)}</span></div>'
    )


def _phase_table(seconds: Mapping[str, float]) -> str:
    """Mean seconds a step of each phase, and its share."""
    total = sum(seconds.values())
    if not total:
        return "<p>No phase was timed.</p>"
    rows = [
        (
            f'<i style="background:{PHASE_COLOURS.get(name, "black")}"></i>{escape(name)}',
            f"{spent:.3f}",
            f"{spent / total:.1%}",
        )
        for name, spent in seconds.items()
    ]
    rows.append(("all", f"{total:.3f}", ""))
    return _table(("phase", "seconds a step, mean", "share"), rows)


def _metrics_table(metrics: Sequence[Metrics]) -> str:
    """Every metric: its last value, and its mean over the steps that have it."""
    names = sorted({key for line in metrics for key in line} - {"step", "version"})
    if not names:
        return "<p>No step has ended.</p>"
    rows = []
    for name in names:
        values = [line[name] for line in metrics if name in line]
        numbers = [float(v) for v in values if not isinstance(v, str) and math.isfinite(v)]
        mean = _number(fmean(numbers)) if numbers else "-"
        rows.append((escape(name), _number(values[-1]), mean))
    return _table(("metric", "last", "mean"), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _number(value: float | int | str) -> str:
    return escape(value) if isinstance(value, str) else f"{value:,.5g}"


def _code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _yaml(value: object) -> str:
    return _code(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
