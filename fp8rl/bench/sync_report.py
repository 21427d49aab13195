"""What `fp8rl bench sync` shows: tables for the terminal, and a picture (sync.png)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench.result import BenchResult
from fp8rl.bench.sync import BREAK_EVEN, FINGERPRINTS, FLOOR_GOAL, MEMCPY, THERE_GOAL
from fp8rl.bench.sync_ways import (
    COMMIT,
    ENCODE,
    FLOOR,
    LOAD,
    PHASES,
    QUANTIZE,
    READ_BACK,
    THERE,
    TRANSPORT,
    VERIFY,
)
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION, YELLOW

COLOURS = {
    QUANTIZE: BLUE,
    ENCODE: SKY,
    TRANSPORT: ORANGE,
    VERIFY: PURPLE,
    LOAD: "#BBBBBB",
    READ_BACK: GREEN,
    COMMIT: VERMILION,
}
SIDES = {"trainer": BLUE, "engine": YELLOW}
MIB = 2**20

Rows = list[dict[str, Any]]


def print_result(result: BenchResult, console: Console) -> None:
    """Print seconds by phase and bytes of each way, and the ratios with their goals."""
    console.print(f"{result.settings['shape']}; {result.settings['weights'] / 1e6:.0f} M weights")
    rows = _ways(result)
    console.print(_figures(rows))
    for row in result.rows:
        if row["part"] in (MEMCPY, FINGERPRINTS):
            median = 1e3 * row["seconds"]["median"]
            sides = [f"{side} {1e3 * row[side]:.1f}" for side in SIDES if side in row]
            console.print(f"{row['part']}: {median:.1f} ms {' + '.join(sides)}".rstrip())
        if row["part"] == BREAK_EVEN:
            link = row["gigabytes_per_second"]
            slower = "any link" if link is None else f"links slower than {link:.2f} GB/s"
            console.print(f"a delta is there sooner than a full version on {slower}")
    console.print(
        "ms: medians of the rounds. MiB kept: from one turn to the next; peak: on top of that, "
        "within one. Shared memory counts on both sides."
    )
    console.print(ratios_table(result, "Ratios within a round"))


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw where the time goes, what is sent, and the memory that it takes."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = _ways(result)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.4), layout="constrained")
        weights = result.settings["weights"] / 1e6
        figure.suptitle(
            f"New weights for an engine: {weights:.0f} M on {result.device}", fontweight="bold"
        )
        grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
        _draw_seconds(figure.add_subplot(grid[0, :]), rows)
        _draw_wire(figure.add_subplot(grid[1, 0]), rows, 2 * result.settings["weights"])
        _draw_memory(figure.add_subplot(grid[1, 1]), rows)
        figure.savefig(path, dpi=120)


def _ways(result: BenchResult) -> Rows:
    return [row for row in result.rows if "phases" in row]


def _figures(rows: Rows) -> Table:
    """One column for each way."""
    table = Table(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["part"], justify="right", max_width=9)  # 80 characters in all
    for what, label in {"median": "ms", "min": "  at least", "max": "  at most"}.items():
        table.add_row(label, *(f"{1e3 * row['seconds'][what]:.0f}" for row in rows))
    for phase in PHASES:
        times = (row["phases"].get(phase) for row in rows)
        table.add_row(f"  {phase}", *("" if t is None else f"{1e3 * t:.0f}" for t in times))
    table.add_row("MiB on the wire", *(f"{row['wire_bytes'] / MIB:.2f}" for row in rows))
    for side in SIDES:
        for what in ("kept", "peak"):
            held = (row[f"{what}_bytes"] for row in rows)
            cells = ("?" if h is None else f"{h[side] / MIB:.0f}" for h in held)
            table.add_row(f"MiB {what}, {side}", *cells)
    return table


def _draw_seconds(axes: Any, rows: Rows) -> None:
    """Phases as stacked bars, and the goals of a full publish as lines."""
    names = [row["part"] for row in rows]
    for phase in PHASES:
        left = [sum(_phase(row, p) for p in PHASES[: PHASES.index(phase)]) for row in rows]
        width = [_phase(row, phase) for row in rows]
        axes.barh(names, width, 0.62, left=left, color=COLOURS[phase], label=phase)
    for place, row in enumerate(rows):
        end = sum(row["phases"].values())
        axes.annotate(f" {row['seconds']['median']:.2f} s", (end, place), va="center", fontsize=9)
    seconds = {row["part"]: row["seconds"]["median"] for row in rows}
    goals = {
        f"goal of ours, full: {1 / FLOOR_GOAL:.0f} x {FLOOR}": (seconds[FLOOR] / FLOOR_GOAL, "--"),
        f"goal of ours, full: {THERE} / {THERE_GOAL:.0f}": (seconds[THERE] / THERE_GOAL, ":"),
    }
    for label, (goal, style) in goals.items():
        axes.axvline(goal, color="black", linestyle=style, linewidth=1.2, label=label)
    axes.set_xlim(0, 1.1 * max(sum(row["phases"].values()) for row in rows))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("Seconds of one update, medians by phase: less is better")
    axes.legend(loc="upper center", bbox_to_anchor=(0.43, -0.09), ncols=5)


def _draw_wire(axes: Any, rows: Rows, bf16_bytes: int) -> None:
    names = [row["part"] for row in rows]
    values = [row["wire_bytes"] / MIB for row in rows]
    bars = axes.barh(names, values, 0.62, color=GREY)
    shares = [f"{row['wire_bytes'] / bf16_bytes:.2%}" for row in rows]
    labels = [f"{value:.3g} ({share})" for value, share in zip(values, shares, strict=True)]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, 30 * max(values))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("MiB sent (share of the BF16 bytes)")


def _draw_memory(axes: Any, rows: Rows) -> None:
    """What each side keeps, full, and takes at most, pale on top."""
    if any(row["kept_bytes"] is None or row["peak_bytes"] is None for row in rows):
        axes.set_axis_off()
        axes.set_title("This system does not tell memory")
        return
    for index, (side, colour) in enumerate(SIDES.items()):
        at = [place + 0.34 * index - 0.17 for place in range(len(rows))]
        kept = [row["kept_bytes"][side] / MIB for row in rows]
        peak = [row["peak_bytes"][side] / MIB for row in rows]
        axes.barh(at, kept, 0.32, color=colour, label=f"{side}, kept")
        bars = axes.barh(at, peak, 0.32, left=kept, color=colour, alpha=0.4, label="peak")
        totals = [f"{k + p:.0f}" for k, p in zip(kept, peak, strict=True)]
        axes.bar_label(bars, totals, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["part"] for row in rows])
    axes.set_xlim(right=1.12 * axes.get_xlim()[1])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("MiB of memory that a way takes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.43, -0.09), ncols=4)


def _phase(row: dict[str, Any], phase: str) -> float:
    return float(row["phases"].get(phase, 0.0))
