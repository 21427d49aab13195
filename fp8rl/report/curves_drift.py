"""The panels of the drift watch: where engine and trainer differ, when, and what of it is a fault.

Two maps of layers by probes, and the sources in the mean over layers, at the probes in which all of
them are numbers. In the maps colours are of a logarithmic scale, what is exactly 0 is left blank,
and NaN is vermilion. A dashed line is where the run fell back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fp8rl.plots import BLUE, GREEN, ORANGE, PURPLE, STYLE, VERMILION
from fp8rl.report.drawing import dot, mean, missing, series
from fp8rl.report.page import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8rl.run_dir import Metrics

LAYER = re.compile(r"drift/(\d+)/own")
SOURCE_COLOURS = {
    "weights": BLUE,
    "activations": ORANGE,
    "cache": GREEN,
    "router": PURPLE,
    "unexplained": VERMILION,
}
SPAN = 1e-3, 1.0  # of the colours, shares of what a layer adds
BLANK, NO_NUMBER = "none", VERMILION  # the colours of 0 and of NaN
WHERE = "fp8rl/drift/parts.py"


def probed(metrics: Sequence[Metrics]) -> bool:
    """Whether any step had a probe."""
    return any("drift/tokens" in line for line in metrics)


def own(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """What each layer of the engine does otherwise than the trainer's, at every probe."""
    axes.set_title("Drift of each layer")
    _map(axes, metrics, "own")


def unexplained(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """What of it no rounding explains."""
    axes.set_title("Unexplained drift")
    _map(axes, metrics, "unexplained")


def sources(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """The parts of the drift, each in the mean over layers."""
    axes.set_title("Where drift comes from")
    axes.set_ylabel("% of what a layer adds")
    layers = _layers(metrics)
    for name, colour in SOURCE_COLOURS.items():
        lines = [dict(zip(*series(metrics, f"drift/{n}/{name}"), strict=True)) for n in layers]
        lines = [line for line in lines if line]
        if not lines:
            continue
        steps = sorted(set.intersection(*map(set, lines)))
        heights = [100 * mean([line[step] for line in lines]) for step in steps]
        axes.plot(steps, heights, color=colour, label=name, marker=dot(steps))
    _mark_fall_backs(axes, metrics, "black")
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.4)


DRAWINGS: tuple[tuple[Callable[[Axes, Sequence[Metrics]], None], Source], ...] = (
    (
        own,
        Source(
            "Each layer of the engine and of the trainer is given the engine's own residual "
            "stream; how far apart are their outputs?",
            "rms(engine - trainer) / rms(what the trainer's layer adds)",
            ("drift/LAYER/own",),
            "every probe",
            WHERE,
        ),
    ),
    (
        unexplained,
        Source(
            "What is left when the trainer rounds its weights, the inputs of its linears and its "
            "KV cache as the engine does: the order of sums, or a fault of the engine.",
            "rms(engine - trainer with all roundings) / rms(what the trainer's layer adds)",
            ("drift/LAYER/unexplained",),
            "every probe",
            WHERE,
        ),
    ),
    (
        sources,
        Source(
            "What each rounding changes, one after the other; the squares of the parts add up to "
            "that of the whole, as far as they are uncorrelated.",
            "rms of a step / rms(what the layer adds), mean over layers",
            tuple(f"drift/LAYER/{name}" for name in SOURCE_COLOURS),
            "every probe",
            WHERE,
        ),
    ),
)


def drift_figure(metrics: Sequence[Metrics], title: str) -> Figure:
    """All panels side by side, for a file of its own."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.4), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        for axes, (draw, _) in zip(figure.subplots(1, 3).flat, DRAWINGS, strict=True):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            draw(axes, metrics)
    return figure


def _map(axes: Axes, metrics: Sequence[Metrics], name: str) -> None:
    """Layers upwards, probes to the right."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in metrics if f"drift/0/{name}" in line]
    if not lines:
        return missing(axes, "no probes yet")
    layers, steps = _layers(metrics), [float(line["step"]) for line in lines]
    rows = [[float(line.get(f"drift/{n}/{name}", 0)) for line in lines] for n in layers]
    shares = numpy.array(rows)
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = [steps[0] - half, *[(a + b) / 2 for a, b in pairwise(steps)]]
    mesh = axes.pcolormesh(
        [*edges, steps[-1] + half],
        [n - 0.5 for n in (*layers, len(layers))],
        numpy.where(shares == 0, SPAN[0] / 2, shares.clip(*SPAN)),  # 0 is under the colours
        norm=LogNorm(*SPAN),
        cmap=colormaps["viridis"].with_extremes(under=BLANK, bad=NO_NUMBER),
        rasterized=True,
    )
    _mark_fall_backs(axes, metrics, "white")
    axes.grid(False)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.get_figure().colorbar(mesh, ax=axes, pad=0.02)  # type: ignore[union-attr]
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1.0], labels=["0.1 %", "1 %", "10 %", "100 %"])
    by_step = numpy.nan_to_num(shares, nan=numpy.inf).T
    column, row = divmod(int(by_step.argmax()), len(layers))  # the first one
    worst = rows[row][column]
    found = "NaN" if math.isnan(worst) else f"{worst:.1%}"
    note = f"layer {layers[row]}, step {steps[column]:.0f}: {found}"
    axes.set_title(note, loc="right", fontsize=9, fontweight="normal")
    return None


def _mark_fall_backs(axes: Axes, metrics: Sequence[Metrics], colour: str) -> None:
    """A line between the last step of the old engine and the first of the new one."""
    for before, after in pairwise(metrics):
        if "drift/fall_back" in before:
            place = (float(before["step"]) + float(after["step"])) / 2
            label = f"-> {after['drift/precision']}"
            axes.axvline(place, color=colour, linestyle="--", label=label)


def _layers(metrics: Sequence[Metrics]) -> list[int]:
    found = {int(match[1]) for line in metrics for key in line if (match := LAYER.fullmatch(key))}
    return sorted(found)
