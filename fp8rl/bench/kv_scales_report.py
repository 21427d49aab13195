"""What `fp8rl bench kv-scales` shows: tables for the terminal, and a picture (kv-scales.png)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench.kv_scales import HOOK_GOAL, STEP_GOAL
from fp8rl.bench.kv_scales_forward import ALONE, AMAX, PERCENTILE, RATES
from fp8rl.bench.result import BenchResult
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREY, ORANGE, PHASE_COLOURS, SKY, STYLE, VERMILION

COLOURS = {AMAX: BLUE, PERCENTILE: SKY, RATES: ORANGE}
LABELS = {
    AMAX: "amax: what a step's calibration observes",
    PERCENTILE: "percentile: with a histogram",
    RATES: "amax, and what the scales in use clip: while a step scores",
}


def print_result(result: BenchResult, console: Console) -> None:
    """Print the forwards, the steps, and the ratios with their goals."""
    hook = [row for row in result.rows if row["part"] == "hook"]
    if hook:
        console.print(_forwards(hook))
    for row in result.rows:
        if row["part"] == "step":
            console.print(_steps(row))
    console.print(
        ratios_table(result, "Without / with, within a round or a step (1 is free)", digits=3)
    )


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw the hook's share of a forward, and where the time of a step goes."""
    import matplotlib
    from matplotlib.figure import Figure

    hook = [row for row in result.rows if row["part"] == "hook"]
    steps = [row for row in result.rows if row["part"] == "step"]
    drawn = [
        (_draw_hook, hook, 1.2 + 0.75 * len(hook) / 4),
        (_draw_steps, steps, 1.6 + 0.5 * len(steps)),
    ]
    drawn = [(draw, rows, height) for draw, rows, height in drawn if rows]
    heights = [height for _, _, height in drawn]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.6 + sum(heights)), layout="constrained")
        figure.suptitle(f"Recalibrating KV-cache scales on {result.device}", fontweight="bold")
        panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
        for axes, (draw, rows, _) in zip(panels.flat, drawn, strict=True):
            draw(axes, result, rows)
        figure.savefig(path, dpi=120)


def _forwards(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="A forward, alone and watched", title_justify="left", box=SIMPLE)
    for heading in ("model", "trainer", "way"):
        table.add_column(heading)
    for heading in ("ms", "min .. max"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["model"], row["trainer"], row["way"], *_time(row["milliseconds"]))
    return table


def _steps(row: dict[str, Any]) -> Table:
    title = f"A step of the demo, scales measured by the {row['measured_by']}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("part", min_width=24)
    for heading in ("ms", "min .. max"):
        table.add_column(heading, justify="right")
    for name, time in row["phases"].items():
        table.add_row(name, *_time(time))
    table.add_row("step", *_time(row["milliseconds"]), style="bold")
    table.add_row("recalibration, of that", *_time(row["recalibration"]), style="bold")
    table.add_row("scales set and proven", *_time(row["engine_scales"]))
    return table


def _time(time: dict[str, float]) -> tuple[str, str]:
    return f"{time['median']:.2f}", f"{time['min']:.2f} .. {time['max']:.2f}"


def _draw_hook(axes: Any, result: BenchResult, rows: list[dict[str, Any]]) -> None:
    """The hook's share of the watched forward, median over rounds, by model and trainer."""
    places = list(dict.fromkeys((row["model"], row["trainer"]) for row in rows))
    height = 0.8 / len(COLOURS)
    for index, (way, colour) in enumerate(COLOURS.items()):
        ratios = [result.ratios[f"{m}, {t}: forward alone / {way}"] for m, t in places]
        shares = [100 * (1 - ratio.median) for ratio in ratios]
        at = [i + (index + 0.5) * height - 0.4 for i in range(len(places))]
        bars = axes.barh(at, shares, height * 0.9, color=colour, label=LABELS[way])
        axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=2, fontsize=8)
    axes.axvline(100 * (1 - HOOK_GOAL), color=VERMILION, linestyle=":", label="goal for amax")
    alone = {
        (r["model"], r["trainer"]): r["milliseconds"]["median"] for r in rows if r["way"] == ALONE
    }
    labels = [f"{m}, {t}\n{alone[m, t]:.0f} ms alone" for m, t in places]
    axes.set_yticks(range(len(places)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("The hook's share of a forward that it watches, in %: less is better")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.6 / len(places)), ncols=2)


def _draw_steps(axes: Any, result: BenchResult, rows: list[dict[str, Any]]) -> None:
    """The median of each phase, stacked; beside it the recalibration's share."""
    for place, row in enumerate(rows):
        left, who = 0.0, row["measured_by"]
        for name, time in row["phases"].items():
            colour = PHASE_COLOURS.get(name, GREY)
            label = name if place == 0 else None
            axes.barh(place, time["median"], 0.6, left=left, color=colour, label=label)
            left += time["median"]
        ratio = result.ratios[f"step without / with recalibration, measured by {who}"]
        share = 1 - ratio.median
        axes.annotate(f" recalibration {share:.1%}", (left, place), va="center", fontsize=9)
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.3 * left))
    named = [f"measured by\nthe {row['measured_by']}" for row in rows]
    axes.set_yticks(range(len(rows)), named, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    goal = f"goal: recalibration takes at most {1 - STEP_GOAL:.0%}"
    axes.set_title(f"Milliseconds of a step of the demo; {goal}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=8)
