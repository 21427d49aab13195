"""What `fp8rl bench density` shows: tables for the terminal, and a picture (density.png)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench.density import GOAL
from fp8rl.bench.density_count import ALL, KINDS
from fp8rl.bench.result import BenchResult
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION

Rows = Sequence[dict[str, Any]]

BF16, FP8 = "BF16 elements", "FP8 codes"
COLOURS = {BF16: ORANGE, FP8: BLUE}
FIELDS = {BF16: "elements", FP8: "codes"}
KIND_COLOURS = {
    "attention": BLUE,
    "MLP": SKY,
    "embedding": GREEN,
    "head": PURPLE,
    "norms": GREY,
    ALL: VERMILION,
}


def print_result(result: BenchResult, console: Console) -> None:
    """Print Gaussian masters, the loop by kind, and the ratios with the goal."""
    simulated = [row for row in result.rows if row["part"] == "simulated"]
    loop = [row for row in result.rows if row["part"] == "loop"]
    console.print(_table("Gaussian masters: % changed in a step", simulated, _simulated_name))
    for rate in dict.fromkeys(row["rate"] for row in loop):
        title = f"The loop at learning rate {rate:g}: % changed in a step, mean"
        rows = [row for row in loop if row["rate"] == rate]
        console.print(_table(title, rows, lambda row: str(row["kind"])))
    console.print(
        "expected: from the updates alone; delta: encoded, % of the BF16 bytes; update: mean "
        "|update| / learning rate"
    )
    console.print(ratios_table(result, "Bytes, step by step"))


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw density against theory, the deltas' weight, and the first steps of a run."""
    import matplotlib
    from matplotlib.figure import Figure

    loop = [row for row in result.rows if row["part"] == "loop"]
    panels = [_draw_density, _draw_deltas, _draw_begun, *([_draw_kinds] if loop else [])]
    with matplotlib.rc_context(STYLE):
        height = 2 * ((len(panels) + 1) // 2)
        figure = Figure(figsize=(12, 2.8 * height), layout="constrained")
        figure.suptitle("What one optimizer step changes of a model", fontweight="bold")
        places = list(figure.subplots(height // 2, 2).flat)
        for draw, place in zip(panels, places, strict=False):
            draw(place, result.rows)
        for place in places[len(panels) :]:
            place.remove()
        figure.savefig(path, dpi=120)


def _simulated_name(row: dict[str, Any]) -> str:
    name = f"sigma {row['sigma']:g}, rate {row['rate']:g}"
    if row["start"] == "settled":
        return name
    return f"{name}, step {row['step']} from BF16, {row['quantized']} quantized"


def _table(title: str, rows: Rows, name: Any) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("what", min_width=20)
    for heading in ("BF16", "expected", "FP8", "expected", "sticky", "scales", "sticky"):
        table.add_column(heading, justify="right")
    for heading in ("BF16 delta", "FP8 delta", "sticky", "update"):
        table.add_column(heading, justify="right")
    fields = (
        *("elements_changed", "elements_expected", "codes_changed", "codes_expected"),
        *("sticky_codes_changed", "scales_changed", "sticky_scales_changed"),
        *("bf16_delta", "fp8_delta", "sticky_delta"),
    )
    for row in rows:
        table.add_row(name(row), *(_percent(row[f]) for f in fields), f"{row['update']:.2f}")
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3f}"


def _settled(rows: Rows) -> dict[float, Rows]:
    """Gaussian masters that have settled, by sigma."""
    chosen = [row for row in rows if row["part"] == "simulated" and row["start"] == "settled"]
    sigmas = dict.fromkeys(row["sigma"] for row in chosen)
    return {sigma: [row for row in chosen if row["sigma"] == sigma] for sigma in sigmas}


def _whole_loop(rows: Rows) -> Rows:
    return [row for row in rows if row["part"] == "loop" and row["kind"] == ALL]


def _draw_density(axes: Any, rows: Rows) -> None:
    """Shares changed over the learning rate: counted as lines, expected as crosses."""
    series = {f"N(0, {sigma:g})": each for sigma, each in _settled(rows).items()}
    if loop := _whole_loop(rows):
        series["the loop"] = loop
    for (name, each), style in zip(series.items(), ("-", "--", ":"), strict=False):
        rates = [row["rate"] for row in each]
        for what, field in FIELDS.items():
            shares = [100 * row[f"{field}_changed"] for row in each]
            axes.plot(rates, shares, style, color=COLOURS[what], label=f"{what}, {name}")
            expected = [100 * row[f"{field}_expected"] for row in each]
            axes.plot(rates, expected, "x", color="black", markersize=7)
    axes.plot([], [], "x", color="black", label="expected from the updates")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="% changed in a step")
    axes.set_title("How much changes: about a tenth in FP8")
    _legend(axes)


def _draw_deltas(axes: Any, rows: Rows) -> None:
    """The encoded deltas as shares of the BF16 bytes, by rate, with the goal."""
    series = {f"N(0, {sigma:g})": each for sigma, each in _settled(rows).items()}
    if loop := _whole_loop(rows):
        series["the loop"] = loop
    for (name, each), style in zip(series.items(), ("-o", "--o", ":o"), strict=False):
        rates = [row["rate"] for row in each]
        for what, field in {"BF16": "bf16_delta", "FP8": "fp8_delta"}.items():
            colour = COLOURS[BF16 if what == "BF16" else FP8]
            shares = [100 * row[field] for row in each]
            axes.plot(rates, shares, style, color=colour, markersize=4, label=f"{what}, {name}")
    axes.axhline(100 / GOAL, color=VERMILION, linestyle=":", label="goal at N(0, 0.02), 1e-06")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="% of the BF16 bytes")
    axes.set_title("What the encoded delta weighs")
    _legend(axes)


def _draw_begun(axes: Any, rows: Rows) -> None:
    """The first steps of a run whose masters are BF16 numbers."""
    begun = [row for row in rows if row["part"] == "simulated" and row["start"] == "checkpoint"]
    lines = {
        "BF16 elements": ("export", "elements", ORANGE),
        "FP8 codes of the BF16 copies": ("export", "codes", BLUE),
        "FP8 codes of the masters themselves": ("master", "codes", GREEN),
    }
    for name, (quantized, field, colour) in lines.items():
        each = [row for row in begun if row["quantized"] == quantized]
        shares = [100 * row[f"{field}_changed"] for row in each]
        axes.plot([row["step"] for row in each], shares, "-o", color=colour, label=name)
        settled = 100 * each[0][f"{field}_expected"]
        axes.axhline(settled, color=colour, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="% changed in a step")
    where = f"N(0, {begun[0]['sigma']:g}), rate {begun[0]['rate']:g}"
    axes.set_title(f"From a BF16 checkpoint: {where}")
    axes.plot([], [], ":", color="black", linewidth=0.8, label="expected once settled")
    _legend(axes)


def _draw_kinds(axes: Any, rows: Rows) -> None:
    """What changed of each kind of tensor in the loop: BF16 elements, and FP8 codes."""
    loop = [row for row in rows if row["part"] == "loop"]
    kinds = [*dict.fromkeys(KINDS.values()), ALL]
    rates = list(dict.fromkeys(row["rate"] for row in loop))
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        of_kind = {row["rate"]: row for row in loop if row["kind"] == kind}
        for what, field in FIELDS.items():
            shares = [of_kind[rate][f"{field}_changed"] for rate in rates]
            if None in shares:
                continue
            at = [i + (index + 0.5) * width - 0.4 for i in range(len(rates))]
            axes.bar(
                at,
                [100 * share for share in shares],
                width * (0.9 if what == BF16 else 0.5),
                color=KIND_COLOURS[kind],
                alpha=0.45 if what == BF16 else 1.0,
                label=kind if what == BF16 else None,
            )
    axes.set_yscale("log")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="learning rate", ylabel="% changed in a step")
    axes.set_title("The loop by kind: BF16 elements pale, FP8 codes full")
    _legend(axes, columns=3)


def _legend(axes: Any, columns: int = 2) -> None:
    """Below, where it hides no line."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, fontsize=8)
