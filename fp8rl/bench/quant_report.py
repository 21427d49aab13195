"""What `fp8rl bench quant` shows: a table for the terminal, and a picture (quant.png)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fp8rl.bench import quant_ways as ways
from fp8rl.bench.result import BenchResult
from fp8rl.bench.tables import ratios_table
from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION, YELLOW

COLOURS = {
    ways.CLONE: "#BBBBBB",
    ways.COPY: GREY,
    ways.OURS: BLUE,
    ways.INTO: SKY,
    ways.CHUNKED: GREEN,
    ways.REFERENCE: YELLOW,
    ways.VLLM: ORANGE,
    ways.HUGGING_FACE: VERMILION,
    ways.TORCHAO: PURPLE,
}


def print_result(result: BenchResult, console: Console) -> None:
    """Print a table for each shape, and the ratios with their goals."""
    for shape in dict.fromkeys(row["shape"] for row in result.rows):
        rows = [row for row in result.rows if row["shape"] == shape]
        table = Table(title=f"{shape}: {rows[0]['size']}, bf16", title_justify="left", box=SIMPLE)
        table.add_column("way", min_width=24)
        for heading in ("ms", "min .. max", "GB/s", "B/weight", "bytes"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(row["way"], *_cells(row))
        console.print(table)
    console.print(
        "B/weight: peak bytes taken for each weight, the result included; bytes: whether they are "
        "those of fp8rl's reference"
    )
    for package in result.settings["not_installed"].values():
        console.print(f"{package} is not installed: not measured")
    console.print(
        ratios_table(result, f"fp8rl, {result.settings['ratios_are_of']}, ratios within a round")
    )


def save_picture(result: BenchResult, path: Path) -> None:
    """Draw GB/s by shape and way, and memory on the first shape."""
    import matplotlib
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in result.rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2 + 1.1 * len(shapes)), layout="constrained")
        figure.suptitle(f"Blockwise FP8 cast of bf16 weights on {result.device}", fontweight="bold")
        memory, speed = figure.subplots(2, 1, height_ratios=(2.2, 1.1 * len(shapes)))
        _memory(memory, [row for row in result.rows if row["shape"] == shapes[0]])
        memory.set_title(
            f"Peak bytes per weight on {shapes[0]}, the result included: less is better"
        )
        _speed(speed, result, shapes)
        speed.set_title("GB/s, each byte read and written counted once: more is better")
        handles, labels = speed.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=120)


def _cells(row: dict[str, Any]) -> list[str]:
    time, peak = row["milliseconds"], row["peak_bytes_per_weight"]
    same = "copy" if "codes_equal" not in row else _share(row["codes_equal"])
    return [
        f"{time['median']:.2f}",
        f"{time['min']:.2f} .. {time['max']:.2f}",
        f"{row['gigabytes_per_second']:.2f}",
        "?" if peak is None else f"{peak:.2f}",
        same,
    ]


def _share(equal: float) -> str:
    return "same" if equal == 1.0 else f"{100 * equal:.2f} %"


def _memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [row["way"] for row in rows]
    values = [row["peak_bytes_per_weight"] or 0.0 for row in rows]
    bars = axes.barh(names, values, color=[COLOURS[name] for name in names])
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _speed(axes: Any, result: BenchResult, shapes: list[str]) -> None:
    names = list(dict.fromkeys(row["way"] for row in result.rows))
    height = 0.84 / len(names)
    for index, name in enumerate(names):
        of_way = {row["shape"]: row for row in result.rows if row["way"] == name}
        values = [of_way[shape]["gigabytes_per_second"] for shape in shapes]
        places = [i + (index + 0.5) * height - 0.42 for i in range(len(shapes))]
        bars = axes.barh(places, values, height * 0.92, color=COLOURS[name], label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=7)
    sizes = {row["shape"]: " x ".join(map(str, row["size"])) for row in result.rows}
    labels = [f"{shape}\n{sizes[shape]}" for shape in shapes]
    axes.set_yticks(range(len(shapes)), labels, fontsize=9)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.grid(axis="y", visible=False)
