"""The page of one run: is FP8 safe, what it bought, why; then curves, times, metrics, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import yaml
from markupsafe import Markup

from fp8rl.plots import GREY, PHASE_COLOURS
from fp8rl.report import page as kit
from fp8rl.report.check import Check
from fp8rl.report.curves import panels, phase_names
from fp8rl.report.data import RunData
from fp8rl.report.figures import figure, figure_row, paint
from fp8rl.report.gains import gains
from fp8rl.report.glossary import definition, groups
from fp8rl.report.verdict import in_plain_words, judge
from fp8rl.report.words import arm, correction, fell_back, warn_saturation
from fp8rl.run_dir import Metrics

NOT_RECORDED = "not recorded: the run has not ended"


def run_page(run: RunData) -> str:
    """The HTML of a run's report."""
    verdict = judge(run)
    page = kit.Page(arm(run.config), *_subtitles(run))
    if not run.ended:
        page.add(kit.notice(f"Stopped at step {run.steps} of {run.planned}, or still running."))
    page.add(*[kit.notice(fell_back(one)) for one in run.fell_back])
    page.add(
        kit.columns(
            kit.answer(
                "Is FP8 safe for this run?",
                verdict.state,
                verdict.word,
                verdict.sentence,
                *in_plain_words(run),
            ),
            kit.facts(_bought(run), gains(run)),
        ),
        check_list(verdict.checks),
    )
    drawn = panels(run.metrics, warn_saturation(run.config))
    page.section("Curves", figure_row(figure(p.figure, p.title, p.note, p.source) for p in drawn))
    page.section("Time per phase", _phases(run))
    page.section("All metrics", *_metrics(run.metrics))
    page.section(
        "How it was run",
        kit.code(run.command or NOT_RECORDED),
        kit.fold("configuration", _yaml(run.config)),
        kit.fold("environment", _yaml(run.environment or NOT_RECORDED)),
        kit.prose(
            kit.download(
                "metrics.json",
                json.dumps(columns_of(run.metrics)),
                "Download the metrics as JSON",
            )
            + ": each name with its values, by step; null where a step has none."
        ),
    )
    return page.html()


def check_list(checks: Sequence[Check]) -> Markup:
    """Checks, one a row."""
    rows = [kit.check_row(c.state, c.name, c.found, c.asks, c.source) for c in checks]
    return Markup('<div class="checks">{}</div>').format(Markup().join(rows))


def columns_of(metrics: Sequence[Metrics]) -> dict[str, list[float | int | str | None]]:
    """Metrics by name instead of by step, as JSON values: NaN and infinities are strings."""
    names = dict.fromkeys(key for line in metrics for key in line)
    return {name: [_plain(line.get(name)) for line in metrics] for name in names}


def _subtitles(run: RunData) -> list[str]:
    config = run.config
    model, task = config.get("model") or {}, config["task"]
    shape = f"{model.get('num_layers')} layers, {model.get('hidden_size')} wide"
    learnt = f"{', '.join(task.get('operations', ()))} of {task.get('min_digits')} to "
    return [
        f"{run.steps} of {run.planned} steps; correction {correction(config)}; "
        f"seed {config['seed']}",
        f"{model.get('family', 'qwen3')}, {shape}; {learnt}{task.get('max_digits')} digits",
    ]


def _bought(run: RunData) -> str:
    return "What it ran with" if run.precision == "bf16" else "What it bought"


def _phases(run: RunData) -> Markup:
    """Mean seconds a step of each phase, and its share."""
    names = phase_names(run.metrics)
    seconds = {n: (run.series(f"time/{n}").total or 0.0) / len(run.metrics) for n in names}
    total = sum(seconds.values())
    if not total:
        return kit.prose("No phase was timed.")
    rows = [
        (
            kit.swatch(paint(PHASE_COLOURS.get(name, GREY)), name),
            f"{spent:.3f}",
            f"{spent / total:.1%}",
        )
        for name, spent in seconds.items()
    ]
    return kit.table(
        ("phase", "seconds a step, mean", "share"), [*rows, ("all", f"{total:.3f}", "")]
    )


def _metrics(metrics: Sequence[Metrics]) -> list[Markup]:
    """Every metric by group: its last value, mean and range; its definition behind its name."""
    names = sorted({key for line in metrics for key in line} - {"step", "version"})
    if not names:
        return [kit.prose("No step has ended.")]
    heads = ("metric", "last", "mean", "least", "most", "steps")
    return [
        kit.fold(f"{title} ({len(held)})", kit.table(heads, [_row(metrics, n) for n in held]))
        for title, held in groups(names)
    ]


def _row(metrics: Sequence[Metrics], name: str) -> list[str | Markup]:
    found = [line[name] for line in metrics if name in line]
    numbers = [float(v) for v in found if not isinstance(v, str) and math.isfinite(v)]
    spread = [f(numbers) if numbers else None for f in (fmean, min, max)]
    label = kit.explained(name, definition(name))
    return [label, _number(found[-1]), *map(_number, spread), str(len(found))]


def _number(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.5g}"


def _plain(value: float | int | str | None) -> float | int | str | None:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _yaml(value: Mapping[str, object] | str) -> Markup:
    return kit.code(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
