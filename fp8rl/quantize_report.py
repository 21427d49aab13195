"""The error of each quantized tensor of a checkpoint, as a table and as a picture, worst first.

    quantization_report/errors.csv    one line a tensor
    quantization_report/errors.png    the worst by name, and all over the depth of the model
    quantization_report/result.json   what was converted, with which options, and what it took

They lie in the new checkpoint's folder, where no loader looks for weights.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION
from fp8rl.quant.checkpoint_extras import REPORT_FOLDER
from fp8rl.run_dir import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8rl.quant.checkpoint_errors import TensorError

COLUMNS = ("tensor", "shape", "relative_rms", "sqnr_db", "saturated", "zero_blocks", "blocks")
SHOWN_WORST = 20  # tensors in the picture by name
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#000000", "#8B5A2B")
MARKERS = "o^sDvP*X"


def write_report(
    folder: Path, errors: Sequence[TensorError], result: Mapping[str, Any], title: str
) -> Path:
    """Write the three files under ``folder``; ``errors`` are worst first. Returns their folder."""
    report = folder / REPORT_FOLDER
    report.mkdir(exist_ok=True)
    write_file(report / "errors.csv", _table(errors).encode())
    picture = io.BytesIO()
    error_figure(errors, title).savefig(picture, format="png", dpi=120)
    write_file(report / "errors.png", picture.getvalue())
    write_file(report / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    return report


def _table(errors: Sequence[TensorError]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for error in errors:
        shape = "x".join(map(str, error.shape))
        measured = [f"{value:.6g}" for value in (error.relative_rms, error.sqnr_db)]
        counts = [f"{error.saturated:.6g}", error.zero_blocks, error.blocks]
        writer.writerow([error.name, shape, *measured, *counts])
    return text.getvalue()


def error_figure(errors: Sequence[TensorError], title: str) -> Figure:
    """The worst tensors by name above, all tensors over their layer below; 10 inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    worst = [error for error in errors if math.isfinite(error.relative_rms)][:SHOWN_WORST]
    with matplotlib.rc_context(STYLE):
        rows = max(len(worst), 4)
        figure = Figure(figsize=(10, 5.4 + 0.24 * rows), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        above, below = figure.subplots(2, 1, height_ratios=[0.24 * rows + 0.6, 4])
        _draw_worst(above, worst)
        _draw_depth(below, errors)
    return figure


def _draw_worst(axes: Axes, worst: Sequence[TensorError]) -> None:
    axes.set_title(f"The {len(worst)} worst tensors")
    axes.set_xlabel("relative RMS error, %")
    places = range(len(worst))
    percent = [100 * error.relative_rms for error in worst]
    axes.barh(places, percent, color=BLUE, height=0.7)
    axes.set_yticks(places, [_short(error.name) for error in worst], fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    for place, error in zip(places, worst, strict=True):
        note = f"{100 * error.relative_rms:.3g} %   {error.sqnr_db:.1f} dB"
        note += f"   saturated {percent_text(error.saturated)}"
        note += f"   zero blocks {error.zero_blocks} of {error.blocks}"
        axes.annotate(
            note, (percent[place], place), (4, 0), textcoords="offset points", va="center",
            fontsize=8.5, color=GREY,
        )  # fmt: skip
    axes.set_xlim(0, 1.9 * max([*percent, 1e-9]))  # room for the notes


def _draw_depth(axes: Axes, errors: Sequence[TensorError]) -> None:
    axes.set_title(f"All {len(errors)} quantized tensors")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative RMS error, %")
    kinds: dict[str, tuple[list[int], list[float]]] = {}
    for error in errors:
        layers, values = kinds.setdefault(_kind(error.name), ([], []))
        layers.append(_layer(error.name))
        values.append(100 * error.relative_rms)
    for index, (kind, points) in enumerate(sorted(kinds.items())):
        axes.scatter(
            *points,
            s=16,
            alpha=0.8,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
            label=kind,
        )
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if kinds:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="linear")


def percent_text(fraction: float) -> str:
    """A small fraction in percent, to two digits, and never 0 where it is not."""
    return "< 0.01 %" if 0 < fraction < 1e-4 else f"{100 * fraction:.2g} %"


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def _kind(name: str) -> str:
    """What linears of all layers and experts have in common: the last part of their names."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _layer(name: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number[1]) if number else 0
