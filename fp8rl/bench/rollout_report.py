"""What `fp8rl bench rollout` shows: tables for the terminal, and a picture (rollout.png)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench.result import BenchResult
from fp8rl.bench.rollout_arms import BF16, FP8, FP8_KV, KV_ONLY, W8A8, Point
from fp8rl.bench.rollout_figures import SMALL_GOAL, point_name
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE

COLOURS = {BF16: GREY, FP8: BLUE, W8A8: PURPLE, KV_ONLY: ORANGE, FP8_KV: GREEN}
MIB = 2**20
BUSY = 0.5  # of the cores, before anything of ours runs

Rows = Sequence[dict[str, Any]]


def print_result(result: BenchResult, console: Console) -> None:
    """Print speed at each point, memory of each arm, and the ratios with their goals."""
    settings = result.settings
    console.print(f"{settings['model']}; {settings['weights'] / 1e6:,.0f} M weights", style="bold")
    console.print(_speed_table(_part(result, "speed")))
    console.print(
        "Responses x tokens; medians of the rounds. Times to the first and for each token in ms, "
        "of all requests, p50 / p99. core ms: time that the engine's threads computed for a token; "
        "cores: how many it got. +update: a weight update before each rollout counts too."
    )
    console.print(_updates(_part(result, "speed")))
    console.print(_memory_table(_part(result, "memory")))
    load = settings["load"]
    console.print(f"The machine's load before each round: {', '.join(f'{x:.1f}' for x in load)}")
    if max(load) > BUSY * result.environment["cpu"]["cores"]:
        console.print("It had other work: tokens/s scatter then; core ms tell more.")
    console.print(ratios_table(result, "Ratios within a round"))


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw speed against batch and length, time per token, updates, capacity and memory."""
    import matplotlib
    from matplotlib.figure import Figure

    speed, settings = _part(result, "speed"), result.settings
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.4), layout="constrained")
        title = f"Rollouts of {settings['model']} on {result.device}"
        figure.suptitle(title, fontweight="bold")
        axes = figure.subplots(2, 3)
        batches = [r for r in speed if r["tokens"] == settings["tokens"] and not r["update_every"]]
        _draw_ratio(axes[0, 0], result, batches)
        _draw_speed(axes[0, 1], batches, "batch", "responses at once")
        lengths = [
            r for r in speed if r["batch"] == settings["length_batch"] and not r["update_every"]
        ]
        _draw_speed(axes[0, 2], lengths, "tokens", "tokens of a response")
        _draw_times(axes[1, 0], batches)
        _draw_updates(axes[1, 1], [r for r in speed if r["update_every"]])
        _draw_capacity(axes[1, 2], _part(result, "memory"))
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, dpi=120)


def _part(result: BenchResult, part: str) -> list[dict[str, Any]]:
    return [row for row in result.rows if row["part"] == part]


def _point(row: dict[str, Any]) -> Point:
    return Point(row["batch"], row["tokens"], row["update_every"])


def _speed_table(rows: Rows) -> Table:
    table = Table(box=SIMPLE, padding=0)
    for heading in ("", "arm"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tok/s", "first", "each", "core ms", "cores", "preempted"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        point, core = _point(row), row["core_seconds_per_token"]
        table.add_row(
            f"{point.batch} x {point.tokens}{' +update' * bool(point.update_every)}"
            if point != before
            else "",
            row["arm"],
            f"{row['tokens_per_second']['median']:,.1f}",
            _times(row["first_token_seconds"]),
            _times(row["output_token_seconds"]),
            "" if core is None else f"{1e3 * core['median']:.1f}",
            "" if core is None else f"{row['cores']:.2f}",
            str(row["preemptions"]),
        )
        before = point
    return table


def _times(seconds: dict[str, float] | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds['p50']:,.0f} / {1e3 * seconds['p99']:,.0f}"


def _updates(rows: Rows) -> str:
    took = [
        f"{row['arm']} {row['update_seconds']:.2f} ({row['recalibration_seconds']:.2f})"
        for row in rows
        if row["update_every"]
    ]
    return f"Seconds of an update (recalibration, of that): {', '.join(took)}" if took else ""


def _memory_table(rows: Rows) -> Table:
    table = Table(box=SIMPLE, padding=0)
    table.add_column("arm", no_wrap=True)
    for heading in (
        "weights MiB",
        "KV MiB",
        "KV tokens",
        "in bf16's KV bytes",
        "in bf16's whole memory",
        "peak MiB",
    ):
        table.add_column(heading, justify="right", max_width=12)
    for row in rows:
        peak = row["device_bytes"] or row["resident_bytes"]
        table.add_row(
            row["arm"],
            f"{row['weight_bytes'] / MIB:,.0f}",
            f"{row['kv_bytes'] / MIB:,.0f}",
            f"{row['kv_tokens']:,}",
            f"{row['kv_tokens_same_kv']:,}",
            f"{row['kv_tokens_same_memory']:,}",
            "?" if peak is None else f"{peak / MIB:,.0f}",
        )
    return table


def _arms(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _of(rows: Rows, arm: str, key: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["arm"] == arm), key=lambda row: row[key])


def _draw_ratio(axes: Any, result: BenchResult, rows: Rows) -> None:
    """Tokens a second by BF16's, with the spread of the rounds."""
    for arm in _arms(rows):
        if arm == BF16:
            continue
        own = _of(rows, arm, "batch")
        names = [f"{arm} / {BF16}, tokens/s, {point_name(_point(row))}" for row in own]
        ratios = [result.ratios[name] for name in names]
        middle = [ratio.median for ratio in ratios]
        spread = [
            [m - r.min for m, r in zip(middle, ratios, strict=True)],
            [r.max - m for m, r in zip(middle, ratios, strict=True)],
        ]
        places = [row["batch"] for row in own]
        axes.errorbar(
            places, middle, spread, color=COLOURS[arm], marker="o", markersize=4, capsize=2
        )
        label = f" {middle[-1]:.2f}"
        axes.annotate(label, (places[-1], middle[-1]), fontsize=8, color=COLOURS[arm], va="center")
        if arm == FP8:
            for place, value in zip(places[:-1], middle, strict=False):
                axes.annotate(
                    f"{value:.2f}",
                    (place, value),
                    (0, 6),
                    textcoords="offset points",
                    fontsize=8,
                    color=COLOURS[arm],
                    ha="center",
                )
    axes.axhline(1, color=GREY, linewidth=1.2)
    _draw_goal(axes, result, rows)
    _ticks(axes, rows, "batch")
    axes.set_xlabel("responses at once")
    axes.set_title("Times BF16's tokens/s")


def _draw_goal(axes: Any, result: BenchResult, rows: Rows) -> None:
    """A line over the batches that have the goal, with its name below the end."""
    names = {row["batch"]: f"{FP8} / {BF16}, tokens/s, {point_name(_point(row))}" for row in rows}
    aimed = [
        b for b, n in names.items() if n in result.ratios and result.ratios[n].goal == SMALL_GOAL
    ]
    if not aimed:
        return
    first, last = 0.8 * min(aimed), max(aimed)
    axes.hlines(SMALL_GOAL, first, last, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        f"goal {SMALL_GOAL:g}",
        (last, SMALL_GOAL),
        (-3, -2),  # below its end, between two batches
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="top",
    )


def _draw_speed(axes: Any, rows: Rows, key: str, label: str) -> None:
    for arm in _arms(rows):
        own = _of(rows, arm, key)
        middle = [row["tokens_per_second"]["median"] for row in own]
        low = [row["tokens_per_second"]["min"] for row in own]
        high = [row["tokens_per_second"]["max"] for row in own]
        places = [row[key] for row in own]
        axes.plot(places, middle, "o-", color=COLOURS[arm], markersize=4, label=arm)
        axes.fill_between(places, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
    _ticks(axes, rows, key)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_title("Output tokens/s" + ("" if key == "batch" else f", {rows[0]['batch']} at once"))


def _draw_times(axes: Any, rows: Rows) -> None:
    """Time per output token: the median as a line, to the 99th percentile as a band."""
    for arm in _arms(rows):
        own = [r for r in _of(rows, arm, "batch") if r["output_token_seconds"] is not None]
        places = [row["batch"] for row in own]
        middle = [1e3 * row["output_token_seconds"]["p50"] for row in own]
        high = [1e3 * row["output_token_seconds"]["p99"] for row in own]
        axes.plot(places, middle, "o-", color=COLOURS[arm], markersize=4)
        axes.fill_between(places, middle, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
    _ticks(axes, rows, "batch")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("responses at once")
    axes.set_title("ms per output token, p50 to p99")


def _draw_updates(axes: Any, rows: Rows) -> None:
    """Tokens a second with an update before each rollout, and what the update takes."""
    if not rows:
        axes.set_axis_off()
        return
    names = [row["arm"] for row in rows]
    speeds = [row["tokens_per_second"]["median"] for row in rows]
    bars = axes.barh(names, speeds, 0.62, color=[COLOURS[name] for name in names])
    labels = [
        f"{speed:,.0f} (update {row['update_seconds']:.2f} s)"
        for speed, row in zip(speeds, rows, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlim(0, 1.8 * max(speeds))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    point = _point(rows[0])
    often = "each" if point.update_every == 1 else f"every {point.update_every}"
    axes.set_title(f"Tokens/s, an update before {often} ({point.batch} x {point.tokens})")


def _draw_capacity(axes: Any, rows: Rows) -> None:
    """Tokens of the cache in the same bytes, and, pale, in the same memory in all."""
    names = [row["arm"] for row in rows]
    colours = [COLOURS[name] for name in names]
    same_kv = [row["kv_tokens_same_kv"] / 1e3 for row in rows]
    same_all = [row["kv_tokens_same_memory"] / 1e3 for row in rows]
    bars = axes.barh(names, same_all, 0.62, color=colours, alpha=0.35)
    axes.barh(names, same_kv, 0.62, color=colours)
    base = rows[0]
    labels = [
        f"{row['kv_tokens_same_kv'] / base['kv_tokens_same_kv']:.2f}x; "
        f"in all {row['kv_tokens_same_memory'] / base['kv_tokens_same_memory']:.2f}x"
        for row in rows
    ]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlim(0, 1.65 * max(same_all))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("Thousand tokens of KV cache\n(pale: in what weights leave, too)")


def _ticks(axes: Any, rows: Rows, key: str) -> None:
    places = sorted({row[key] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
