"""The picture of a run: six panels, each a function from metrics to one pair of axes.

``curves`` draws all six into one figure (curves.png, for a README); ``panels`` draws each into its
own (for the report, where they reflow on a small screen). Colours are Okabe and Ito's and viridis,
which colour-blind readers can tell apart. A series that a run has not is said to be missing, in
its panel. matplotlib is imported here only when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8rl.run_dir import Metrics

    Draw = Callable[[Axes, Sequence[Metrics]], None]

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#6E6E6E"
PHASE_COLOURS = {
    "observe": SKY,
    "quantize": YELLOW,
    "publish": VERMILION,
    "rollout": BLUE,
    "score": PURPLE,
    "train": GREEN,
    "eval": ORANGE,
    "checkpoint": GREY,
}
ACCEPTABLE_EXCESS = 0.05  # mean exp|dlogp| < 1.05 is acceptable (NVIDIA's blog on NeMo-RL)
SPREAD_OCTAVES = 0.5  # height over which lines at one and the same scale are drawn side by side
LEAST_SATURATION = 1e-6  # share below which the axis is linear, down to 0
KV_SCALE = re.compile(r"kv_scale/(\d+)/([kv])")
STYLE: dict[Any, Any] = {  # matplotlib types its keys as a union of literals
    "font.size": 10.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


def curves(metrics: Sequence[Metrics], title: str, warn_saturation: float | None = None) -> Figure:
    """All panels in one figure of 10 x 10.5 inches, three rows of two.

    ``warn_saturation`` is the run's threshold, None where it has none.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 10.5), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        for axes, draw in zip(figure.subplots(3, 2).flat, _drawings(warn_saturation), strict=True):
            _panel(axes, draw, metrics)
    return figure


def panels(metrics: Sequence[Metrics], warn_saturation: float | None = None) -> Iterator[str]:
    """Each panel as an ``<svg>`` element of its own, 5.2 x 3.4 inches, its text as text."""
    import matplotlib
    from matplotlib.figure import Figure

    for draw in _drawings(warn_saturation):
        svg = io.StringIO()
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(5.2, 3.4), layout="constrained")
            _panel(figure.subplots(), draw, metrics)
            figure.savefig(svg, format="svg", metadata={"Date": None})
        text = svg.getvalue()
        yield text[text.index("<svg") :]


def reward(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Mean reward of the training batches, and on the prompts never trained on."""
    axes.set_title("Reward")
    axes.set_ylabel("mean reward")
    train, heldout = _series(metrics, "reward/train"), _series(metrics, "reward/heldout")
    if not train[0] and not heldout[0]:
        return _missing(axes, "no rewards yet")
    axes.plot(*train, color=SKY, label="train", marker=_dot(train[0]))
    axes.plot(*heldout, color=BLUE, marker="o", markersize=4.5, label="held-out")
    for x, y in sorted({*zip(*heldout, strict=True)})[:: max(1, len(heldout[0]) - 1)]:  # ends
        axes.annotate(f"{y:.2f}", (x, y), (-2, -15), textcoords="offset points", color=BLUE)
    axes.set_ylim(-0.03, max(1.03, *train[1], *heldout[1]))
    axes.legend(loc="best")


def mismatch(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """How far the policy that sampled is from the policy that learns."""
    axes.set_title("Mismatch of rollout and trainer")
    axes.set_ylabel("log scale, no unit")
    k3 = _series(metrics, "rollout_corr/k3_kl")
    steps, exp_abs = _series(metrics, "rollout_corr/token_mult_prob_error")
    excess = (steps, [value - 1 for value in exp_abs])
    if not k3[0] and not steps:
        return _missing(axes, "mismatch was not measured")
    drawn = [value for value in (*k3[1], *excess[1]) if value > 0]
    if not drawn:
        return _missing(axes, "rollout and trainer are equal:\nthe mismatch is 0 at every step")
    axes.set_yscale("log", nonpositive="mask")
    axes.plot(*excess, color=VERMILION, label="mean exp|\u0394log p| \u2212 1", marker=_dot(steps))
    axes.plot(*k3, color=BLUE, label="KL, k3 estimate (nats)", marker=_dot(k3[0]))
    axes.axhline(ACCEPTABLE_EXCESS, color=VERMILION, linestyle=":", linewidth=1.2)
    axes.annotate(
        f"exp|\u0394log p| = {1 + ACCEPTABLE_EXCESS:.2f}: acceptable below",
        (0.01, ACCEPTABLE_EXCESS),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=VERMILION,
        fontsize=8.5,
    )
    low, high = min(drawn), max(*drawn, 2 * ACCEPTABLE_EXCESS)
    axes.set_ylim(low / 6, high * 1.5)  # room for the legend below
    axes.legend(loc="lower left", ncols=2, columnspacing=1.2, handlelength=1.6)


def corrected(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """The tokens whose importance weight the correction changed."""
    axes.set_title("Tokens truncated and rejected")
    axes.set_ylabel("% of response tokens")
    truncated = _series(metrics, "rollout_corr/rollout_is_ratio_fraction_high")
    rejected = _series(metrics, "rollout_corr/rollout_rs_masked_fraction")
    if not truncated[0] and not rejected[0]:
        return _missing(axes, "no correction")
    for (steps, values), colour, name in (
        (truncated, VERMILION, "truncated"),
        (rejected, BLUE, "rejected"),
    ):
        label = f"{name}, mean {100 * _mean(values):.2g} %" if steps else f"{name}: not measured"
        axes.plot(steps, [100 * v for v in values], color=colour, label=label, marker=_dot(steps))
    top = 100 * max(*truncated[1], *rejected[1], 0.0001)
    axes.set_ylim(-0.04 * top, 1.35 * top)
    axes.legend(loc="upper left")


def kv_scales(axes: Axes, metrics: Sequence[Metrics], warn_saturation: float | None = None) -> None:
    """The scale of each layer's K and V cache, and below (right axis) what the scales clip.

    Lines that would coincide are spread a little.
    """
    axes.set_title("KV-cache scales")
    axes.set_ylabel("scale (lines spread)", loc="top")
    names = {match.groups() for line in metrics for key in line if (match := KV_SCALE.match(key))}
    lines = sorted((int(layer), kind) for layer, kind in names)
    if not lines:
        return _missing(axes, "BF16 KV cache: no scales")
    drawn, changes = _scale_lines(axes, metrics, lines)
    low, high = math.floor(min(drawn, default=0) + 0.5), math.ceil(max(drawn, default=0) - 0.5)
    span = high - low + 1.5
    axes.set_ylim(low - 0.75 - 0.8 * span, high + 0.75 + 0.5 * span)  # saturation; legend
    ticks = range(low, high + 1)
    axes.set_yticks(ticks, [rf"$2^{{{tick}}}$" for tick in ticks])
    note = f"{changes} changes" if changes else "constant in all steps"
    axes.set_title(f"{len(lines)} scales, {note}", loc="right", fontsize=9, fontweight="normal")
    axes.legend(loc="upper left", ncols=4, columnspacing=1.2)
    _saturation(axes, metrics, warn_saturation)


def _scale_lines(
    axes: Axes, metrics: Sequence[Metrics], lines: Sequence[tuple[int, str]]
) -> tuple[list[float], int]:
    """Draw log2 of each scale; returns the finite heights drawn, and how often a scale changed."""
    from matplotlib import colormaps

    layers = sorted({layer for layer, _ in lines})
    drawn, changes = [], 0
    for index, (layer, kind) in enumerate(lines):
        steps, scales = _series(metrics, f"kv_scale/{layer}/{kind}")
        changes += sum(a != b for a, b in pairwise(scales))
        offset = SPREAD_OCTAVES * ((index + 0.5) / len(lines) - 0.5)
        heights = [math.log2(scale) + offset if scale > 0 else math.nan for scale in scales]
        named = len(layers) <= 4 or layer in (layers[0], layers[-1])
        axes.step(
            steps,
            heights,
            where="post",
            color=colormaps["viridis"](0.9 * layers.index(layer) / max(1, len(layers) - 1)),
            linestyle="-" if kind == "k" else (0, (4, 1.5)),
            marker=_dot(steps),
            label=f"{kind}{layer}" if named else None,
        )
        drawn += [height for height in heights if math.isfinite(height)]
    return drawn, changes


def _saturation(axes: Axes, metrics: Sequence[Metrics], warn_saturation: float | None) -> None:
    """The highest saturation of any layer's q, k or v, in the lowest third, with the threshold."""
    steps, shares = _series(metrics, "kv/saturation_max")
    if not steps:
        return
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.set_yscale("symlog", linthresh=LEAST_SATURATION)
    right.set_ylim(-0.3 * LEAST_SATURATION, 1e12)
    right.plot(steps, shares, color=VERMILION, marker=_dot(steps))
    ticks = {0.0: "0", 1e-4: "0.01 %", 1e-2: "1 %", 1.0: "100 %"}
    right.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    right.minorticks_off()
    right.set_ylabel("clipped, at most", color=VERMILION, loc="bottom", fontsize=9)
    right.tick_params(axis="y", labelcolor=VERMILION)
    if warn_saturation is not None:
        right.axhline(warn_saturation, color=VERMILION, linestyle=":", linewidth=1.2)
        right.annotate(
            "warns above",
            (0.01, warn_saturation),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=VERMILION,
            fontsize=8.5,
        )


def phase_times(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Seconds of each phase, stacked."""
    axes.set_title("Time per step")
    axes.set_ylabel("seconds")
    names = phase_names(metrics)
    series = {name: dict(zip(*_series(metrics, f"time/{name}"), strict=True)) for name in names}
    timed = sorted({step for spent in series.values() for step in spent})
    if not timed:
        return _missing(axes, "no phase was timed")
    steps = range(int(timed[0]), int(timed[-1]) + 1)
    edges = [step - 0.5 for step in (*steps, steps.stop)]
    bottom = [0.0] * len(steps)
    for name, spent in series.items():
        top = [low + spent.get(step, 0.0) for low, step in zip(bottom, steps, strict=True)]
        colour = PHASE_COLOURS.get(name, "black")
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=name)
        bottom = top
    axes.set_ylim(0, 1.4 * max(*bottom, 1e-3))
    axes.legend(loc="upper left", ncols=4, columnspacing=0.9, handlelength=1.0, handletextpad=0.5)


def speed(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Rollout tokens a second (left axis), and milliseconds of a weight sync (right axis)."""
    axes.set_title("Rollout speed and weight sync")
    tokens = _series(metrics, "rollout/tokens_per_second")
    steps, seconds = _series(metrics, "sync/seconds")
    if not tokens[0] and not steps:
        return _missing(axes, "neither was measured")
    axes.plot(*tokens, color=BLUE, marker=_dot(tokens[0]))
    axes.set_ylabel("rollout tokens/s", color=BLUE)
    axes.tick_params(axis="y", labelcolor=BLUE)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.25 * max(*tokens[1], 1.0))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.plot(steps, [1000 * s for s in seconds], color=VERMILION, marker=_dot(steps))
    right.set_ylabel("weight sync, ms", color=VERMILION)
    right.tick_params(axis="y", labelcolor=VERMILION)
    right.set_ylim(0, 2.5e3 * max(*seconds, 1e-3))  # lower half: the two lines stay apart
    return None


def _drawings(warn_saturation: float | None) -> tuple[Draw, ...]:
    """The panels, in order."""
    scales = partial(kv_scales, warn_saturation=warn_saturation)
    return reward, mismatch, corrected, scales, phase_times, speed


def phase_names(metrics: Sequence[Metrics]) -> list[str]:
    """The phases timed in a run, in the order of a step; ``time/step``, their sum, is none."""
    found = dict.fromkeys(
        key.removeprefix("time/") for line in metrics for key in line if key.startswith("time/")
    )
    known = [name for name in PHASE_COLOURS if name in found]
    return known + [name for name in found if name not in PHASE_COLOURS and name != "step"]


def _panel(axes: Axes, draw: Draw, metrics: Sequence[Metrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    draw(axes, metrics)
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 1, right + 1)


def _series(metrics: Sequence[Metrics], key: str) -> tuple[list[float], list[float]]:
    """The steps that have a finite value of ``key``, and the values."""
    pairs = [(float(line["step"]), float(line[key])) for line in metrics if key in line]
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    return [step for step, _ in finite], [value for _, value in finite]


def _dot(steps: Sequence[float]) -> str:
    """A marker where a line of one point would be invisible."""
    return "." if len(steps) == 1 else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _missing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("")
    axes.set_ylabel("")
