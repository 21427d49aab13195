"""The picture of a study: all differences in one forest, and below it each group's curves.

    forest        difference to the baseline of each seed (dots), their mean and 95 % interval, and
                  the margin within which a difference is none that matters
    reward        mean over seeds and its 95 % interval (Student's t), a band for each arm
    other curves  the median over seeds; each seed is a thin line

A run whose numbers broke ends there; collapses are marked with a cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION
from fp8rl.report.page import Source
from fp8rl.report.statistics import interval
from fp8rl.stability import measure as keys
from fp8rl.stability.claims import verdict_text
from fp8rl.stability.measure import Measured, evaluations
from fp8rl.stability.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR = GREY
ARM_COLOURS = (VERMILION, BLUE, GREEN, ORANGE, PURPLE, SKY)
VERDICT_COLOURS = {"same": GREEN, "better": GREEN, "worse": VERMILION, "undecided": ORANGE}
DPI = 130
LEAST_TOP = 0.01  # of a linear axis, where all values are 0


@dataclass(frozen=True)
class Curve:
    """A metric drawn for each arm: its name, key, scale, and where it comes from."""

    title: str
    key: str
    log: bool
    source: Source


CURVES = (
    Curve(
        "Mismatch KL (k3, nats)",
        keys.K3,
        True,
        Source("How far the engine's policy is from the trainer's.", "mean(r - 1 - log r)"),
    ),
    Curve(
        "Tokens truncated",
        keys.TRUNCATED,
        False,
        Source(
            "Share of response tokens whose ratio is above the correction's upper bound: their "
            "weight was cut (TIS), or they left the loss (MIS). 0 where nothing is corrected."
        ),
    ),
    Curve(
        "Gradient norm",
        keys.GRADIENT,
        True,
        Source("Before it was clipped, mean over a step's minibatches."),
    ),
    Curve(
        "Policy entropy (nats a token)",
        keys.ENTROPY,
        False,
        Source("Of the trainer's policy on the rollout's tokens.", "- sum p log p"),
    ),
)


class Drawn:
    """A study's curves, read once."""

    def __init__(self, result: Result) -> None:
        self.result, plan = result, result.plan
        self.lines = {run.name: run.folder.metrics() for run in plan.runs}
        self.groups: dict[str, list[str]] = {}
        for arm in plan.arms:
            self.groups.setdefault(plan.study.arms[arm].group, []).append(arm)
        for arms in self.groups.values():  # their baselines first
            bases = {plan.study.arms[arm].against for arm in arms} - {None}
            arms[:0] = [base for base in plan.arms if base in bases and base not in arms]

    @cached_property
    def colours(self) -> dict[tuple[str, str], str]:
        """Group and arm -> colour; baselines are grey."""
        study, found = self.result.plan.study, {}
        for group, arms in self.groups.items():
            others = iter(ARM_COLOURS)
            for arm in arms:
                base = study.arms[arm].against is None
                found[group, arm] = BASELINE_COLOUR if base else next(others, GREY)
        return found

    def seeds(self, arm: str, key: str) -> list[dict[int, float]]:
        """Step -> value of each of an arm's runs."""
        runs = self.result.plan.of_arm(arm)
        if key == keys.REWARD:
            numbers = {row.seed for row in self.result.rows[arm]}
            done = [run for run in runs if run.seed in numbers]
            return [dict(evaluations(run, self.lines[run.name], key)) for run in done]
        found = [
            {int(line["step"]): float(line[key]) for line in self.lines[run.name] if key in line}
            for run in runs
        ]
        return [series for series in found if series]


def write_picture(result: Result) -> None:
    """Write stability.png into the study's folder."""
    picture(result).savefig(result.plan.out / "stability.png", dpi=DPI)


def picture(result: Result) -> Figure:
    """The forest, and below it all groups side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = Drawn(result)
    count, rows = len(drawn.groups), 1 + len(CURVES)
    forest_height = 0.42 * max(2, len(result.verdicts)) + 1.2
    with matplotlib.rc_context(STYLE):
        width = max(9.0, 5.0 * count)
        figure = Figure(figsize=(width, 2.7 * rows + forest_height), layout="constrained")
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[forest_height, 2.7 * rows])
        top, bottom = parts[:, 0].tolist()
        axes = top.subplots()
        draw_forest(axes, result)
        axes.set_title("Difference of held-out reward to the baseline, 95 % interval over seeds")
        grid = bottom.subplots(rows, count, squeeze=False, sharey="row")
        for group, column in zip(drawn.groups, grid.T.tolist(), strict=True):
            draw_rewards(column[0], drawn, group)
            column[0].set_title(f"{group}: held-out reward, 95 % band")
            column[0].legend(loc="best", fontsize=8)
            for place, curve in zip(column[1:], CURVES, strict=True):
                draw_curve(place, drawn, group, curve)
                place.set_title(curve.title)
            column[-1].set_xlabel("step")
    return figure


def draw_rewards(axes: Axes, drawn: Drawn, group: str) -> None:
    """A band for each arm of the group; crosses where runs collapsed."""
    study = drawn.result.plan.study
    for arm in drawn.groups[group]:
        colour, series = drawn.colours[group, arm], drawn.seeds(arm, keys.REWARD)
        if not series:
            continue
        steps = sorted(set.intersection(*(set(one) for one in series)))
        found = [interval([one[step] for one in series]) for step in steps]
        means = [one.mean for one in found]
        axes.plot(steps, means, color=colour, marker=".", label=study.arms[arm].title)
        low, high = ([one.low for one in found], [one.high for one in found])  # NaN: not drawn
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        _crosses(axes, drawn.result.collapsed(arm), colour)
    axes.set_ylim(0, min(1.05, axes.get_ylim()[1]))


def draw_curve(axes: Axes, drawn: Drawn, group: str, curve: Curve) -> None:
    """The median over seeds of each arm, and each seed as a thin line."""
    for arm in drawn.groups[group]:
        colour, series = drawn.colours[group, arm], drawn.seeds(arm, curve.key)
        for one in series:
            axes.plot(*_pairs(one), color=colour, linewidth=0.5, alpha=0.4)
        middle = {s: median(o[s] for o in series if s in o) for s in sorted(_union(series))}
        if middle:
            axes.plot(*_pairs(middle), color=colour)
    if curve.log:
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(0, max(axes.get_ylim()[1], LEAST_TOP))


def draw_forest(axes: Axes, result: Result, *, short: bool = False) -> None:
    """Each arm's difference to its baseline: seeds, mean, interval; the margin; the verdict.

    ``short``: arms by their names, and no verdicts, for where these stand beside it.
    """
    study = result.plan.study
    shown = [arm for arm in result.plan.arms if arm in result.verdicts]
    rewards = {arm: {row.seed: row.reward for row in rows} for arm, rows in result.rows.items()}
    axes.axvspan(-study.margin, study.margin, color=GREEN, alpha=0.10, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=1)
    for place, arm in enumerate(shown):
        found, base = result.verdicts[arm], rewards[str(study.arms[arm].against)]
        colour = VERDICT_COLOURS[found.word]
        apart = [value - base[seed] for seed, value in rewards[arm].items() if seed in base]
        axes.plot(apart, [place] * len(apart), "o", color=colour, markersize=4, alpha=0.35)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.4)
        axes.plot([found.difference], [place], "D", color=colour, markersize=6)
        lost = len(result.collapsed(arm))
        if not short:
            axes.annotate(
                verdict_text(found) + (f"; {lost} collapsed" if lost else ""),
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=colour,
                annotation_clip=False,
            )
    labels = [f"{study.arms[a].title}  (against {study.arms[a].against})" for a in shown]
    axes.set_yticks(range(len(shown)), shown if short else labels)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"shaded: within +-{study.margin:g}, no difference that matters")


def _crosses(axes: Axes, collapsed: Iterable[Measured], colour: str) -> None:
    for row in collapsed:
        assert row.collapse is not None
        height = row.collapse.found or 0.0
        axes.plot([row.collapse.step], [height], "x", color=colour, markersize=8)


def _pairs(series: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(series)
    return steps, [series[step] for step in steps]


def _union(series: Sequence[Mapping[int, float]]) -> set[int]:
    return {step for one in series for step in one}
