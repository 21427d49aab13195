"""What all panels share: a metric as a line, and what is drawn where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8rl.plots import GREY
from fp8rl.report.page import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8rl.run_dir import Metrics


@dataclass(frozen=True)
class Panel:
    """A drawn panel: its figure without the title, the title, a note beside it, its source."""

    figure: Figure
    title: str
    note: str
    source: Source


def series(metrics: Sequence[Metrics], key: str) -> tuple[list[float], list[float]]:
    """The steps that have a finite value of ``key``, and the values."""
    pairs = [(float(line["step"]), float(line[key])) for line in metrics if key in line]
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    return [step for step, _ in finite], [value for _, value in finite]


def dot(steps: Sequence[float]) -> str:
    """A marker where a line of one point would be invisible."""
    return "." if len(steps) == 1 else ""


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def missing(axes: Axes, why: str) -> None:
    """Say why there is nothing, in the middle of the panel."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("")
    axes.set_ylabel("")
