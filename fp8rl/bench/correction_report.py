"""What `fp8rl bench correction` shows: a table for each case, and a picture (correction.png)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench import correction_ways as ways
from fp8rl.bench.result import BenchResult
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREY, STYLE, VERMILION

COLOURS = {ways.OURS: BLUE, ways.VERL: VERMILION, ways.TORCH: GREY}


def print_result(result: BenchResult, console: Console) -> None:
    """Print a table for each case, and the ratios with their goals."""
    for case, rows in _by_case(result).items():
        table = Table(title=f"{case} ({rows[0]['size']})", title_justify="left", box=SIMPLE)
        table.add_column("way", min_width=8)
        for heading in ("ms", "min .. max", "peak MiB", "apart from ours"):
            table.add_column(heading, justify="right")
        for row in rows:
            time, peak = row["milliseconds"], row["peak_mebibytes"]
            table.add_row(
                row["way"],
                f"{time['median']:.1f}",
                f"{time['min']:.1f} .. {time['max']:.1f}",
                "?" if peak is None else f"{peak:.0f}",
                f"{row['largest_difference']:.1g}",
            )
        console.print(table)
    console.print("peak: memory taken beyond what was held before the call, its result included")
    if "verl" in result.settings["not_installed"]:
        console.print(
            "verl is not installed here: not measured. `make setup-verl` makes an environment that "
            "has it: .venv-verl/bin/fp8rl bench correction"
        )
    console.print(ratios_table(result, "fp8rl, ratios within a round"))


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw milliseconds and memory of each case by every way."""
    import matplotlib
    from matplotlib.figure import Figure

    cases = _by_case(result)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6 + 1.1 * len(cases)), layout="constrained")
        figure.suptitle(f"Correction, loss and log-probs on {result.device}", fontweight="bold")
        left, right = figure.subplots(1, 2, sharey=True)
        _bars(left, cases, lambda row: row["milliseconds"]["median"])
        left.set_title("milliseconds: less is better", loc="left")
        _bars(right, cases, lambda row: row["peak_mebibytes"] or 0.0)
        right.set_title("MiB taken at most: less is better", loc="left")
        handles, labels = left.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=120)


def _by_case(result: BenchResult) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result.rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _bars(axes: Any, cases: dict[str, list[dict[str, Any]]], value: Any) -> None:
    places: list[int] = []
    for index, rows in enumerate(cases.values()):
        places.append(index)
        height = 0.8 / len(rows)
        for turn, row in enumerate(rows):
            at = index + (turn + 0.5) * height - 0.4
            way = row["way"]
            bar = axes.barh(at, value(row), 0.9 * height, color=COLOURS[way], label=way)
            axes.bar_label(bar, [f"{value(row):.3g}"], padding=2, fontsize=8)
    labels = [f"{_wrapped(case)}\n{rows[0]['size']}" for case, rows in cases.items()]
    axes.set_yticks(places, labels, fontsize=9)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def _wrapped(case: str) -> str:
    return case.replace(": ", ":\n").replace(", and", ",\nand")
