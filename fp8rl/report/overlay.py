"""Curves of several arms in one panel: a colour an arm, thin lines its seeds, a band their mean.

The band is the 95 % interval of the mean over seeds (Student's t; on a log axis that of logarithms)
at each step that all seeds of the arm have measured; where it is wider than the panel it is cut.
Arms with short names are named at the end of their lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from textwrap import fill
from typing import TYPE_CHECKING

from fp8rl.plots import STYLE
from fp8rl.report.comparison import Arm
from fp8rl.report.drawing import Panel, dot, missing
from fp8rl.report.figures import PANEL_INCHES
from fp8rl.report.page import Source
from fp8rl.report.statistics import Interval, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Points = dict[int, float]

LINE = 0.07  # of a name, of the panel's height
NAME_WIDTH, NAME_LENGTH = 17, 34  # characters of a name: in a line, in all


@dataclass(frozen=True)
class Curve:
    """A metric over steps: ``minus`` is taken off it, a log axis has no zero."""

    key: str
    title: str
    unit: str
    log: bool = False
    minus: float = 0.0


CURVES = (
    Curve("reward/heldout_trainer", "Held-out reward, exact", "mean probability"),
    Curve("reward/heldout", "Held-out reward", "mean reward"),
    Curve("reward/train", "Training reward", "mean reward"),
    Curve(
        "rollout_corr/token_mult_prob_error",
        "Mismatch of probabilities",
        "mean exp|\u0394log p| \u2212 1",
        log=True,
        minus=1.0,
    ),
    Curve("rollout_corr/k3_kl", "Mismatch KL (k3)", "nats", log=True),
    Curve("grad_norm", "Gradient norm", "before clipping"),
    Curve("policy/entropy", "Entropy of the policy", "nats a token"),
    Curve("rollout/tokens_per_second", "Rollout speed", "tokens/s"),
    Curve("router/agreement", "Router agreement", "share of choices"),
)


def overlays(arms: Sequence[Arm]) -> Iterator[Panel]:
    """A panel for each curve that an arm has measured."""
    import matplotlib
    from matplotlib.figure import Figure

    for curve in CURVES:
        if not any(run.series(curve.key) for arm in arms for run in arm.runs):
            continue
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=PANEL_INCHES, layout="constrained")
            _draw(figure.subplots(), curve, arms)
        yield Panel(figure, curve.title, "", _source(curve))


def _draw(axes: Axes, curve: Curve, arms: Sequence[Arm]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_ylabel(curve.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if curve.log:
        axes.set_yscale("log", nonpositive="mask")
    points = {arm.name: list(_points(curve, arm)) for arm in arms}
    drawn = [arm for arm in arms if points[arm.name]]
    if not drawn:
        return missing(axes, "0 at every step" if curve.log else "not measured")
    ends = [(arm, _lines(axes, arm, points[arm.name])) for arm in drawn]
    limits = axes.get_ylim()  # of the lines: a band of few seeds can be far wider
    for arm in drawn:
        _band(axes, arm, points[arm.name])
    axes.set_ylim(limits)
    _names(axes, ends)


def _points(curve: Curve, arm: Arm) -> Iterator[Points]:
    """The steps and values of each seed that has some to draw."""
    for run in arm.runs:
        line = run.series(curve.key)
        values = {s: v - curve.minus for s, v in zip(line.steps, line.values, strict=True)}
        kept = {step: v for step, v in values.items() if v > 0 or not curve.log}
        if kept:
            yield kept


def _lines(axes: Axes, arm: Arm, points: Sequence[Points]) -> tuple[float, float]:
    """Draw an arm's seeds, and their mean where there are several; returns where it ends."""
    several = len(points) > 1
    for line in points:
        axes.plot(
            [*line],
            [*line.values()],
            color=arm.colour,
            marker=dot([*line]),
            linewidth=0.8 if several else 1.8,
            alpha=0.4 if several else 1.0,
        )
    steps, found = _over_seeds(axes, points)
    if several and steps:
        axes.plot(steps, [i.mean for i in found], color=arm.colour, marker=dot(steps))
    return (steps[-1], found[-1].mean) if steps else [*points[0].items()][-1]


def _band(axes: Axes, arm: Arm, points: Sequence[Points]) -> None:
    steps, found = _over_seeds(axes, points)
    ends = [i.low for i in found], [i.high for i in found]
    axes.fill_between(steps, *ends, color=arm.colour, alpha=0.12, lw=0)


def _over_seeds(axes: Axes, points: Sequence[Points]) -> tuple[list[int], list[Interval]]:
    """Mean and interval at each step that all seeds have; of logarithms where the axis is."""
    steps = sorted(set.intersection(*map(set, points)))
    if axes.get_yscale() != "log":
        return steps, [interval([line[step] for line in points]) for step in steps]
    logs = [interval([log(line[step]) for line in points]) for step in steps]
    return steps, [Interval(*map(exp, i)) for i in logs]


def _names(axes: Axes, ends: Sequence[tuple[Arm, tuple[float, float]]]) -> None:
    """Write each arm's name beside the end of its line, apart from each other."""
    if any(len(arm.name) > NAME_LENGTH for arm, _ in ends):
        return  # the page names the colours
    transform = axes.transData + axes.transAxes.inverted()
    heights = {arm.name: float(transform.transform(end)[1]) for arm, end in ends}
    top = float("-inf")  # of the name below
    for arm, _ in sorted(ends, key=lambda pair: heights[pair[0].name]):
        name = fill(arm.name, NAME_WIDTH)
        half = LINE * (1 + name.count("\n")) / 2
        height = max(heights[arm.name], top + half)
        top = height + half
        axes.annotate(
            name,
            (1.02, height),
            xycoords="axes fraction",
            color=arm.colour,
            fontsize=9,
            va="center",
        )


def _source(curve: Curve) -> Source:
    return Source(
        "Thin lines are seeds; where an arm has several, the thick one is their mean and the band "
        "its 95 % interval (Student's t; on a log axis that of logarithms).",
        keys=(curve.key,),
        over="each step that all seeds of an arm have",
        file="each run's metrics.jsonl",
    )
