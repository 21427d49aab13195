"""The pictures of one run: panels, each a function from metrics to one pair of axes.

``curves`` draws six into one figure (curves.png, for a README); ``panels`` draws each into its
own (for the page, where they reflow on a small screen). A series that a run has not is said to be
missing, in its panel. matplotlib is imported here only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fp8rl.plots import BLUE, PHASE_COLOURS, SKY, STYLE, VERMILION
from fp8rl.report import curves_drift
from fp8rl.report.checks_mismatch import EXP_ABS
from fp8rl.report.curves_kv import kv_scales
from fp8rl.report.drawing import Panel, dot, mean, missing, series
from fp8rl.report.figures import PANEL_INCHES
from fp8rl.report.page import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp8rl.run_dir import Metrics

    Draw = Callable[[Axes, Sequence[Metrics]], None]

UNDERLAY = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.0}  # of text
ACCEPTABLE_EXCESS = EXP_ABS[1] - 1


SOURCES = (  # of the panels, in order
    Source(
        "Mean reward of each training batch, and of one sample for each prompt never trained on.",
        keys=("reward/train", "reward/heldout"),
        over="every step; held-out where it was due (eval_every)",
    ),
    Source(
        "How far the engine's probabilities of the sampled tokens are from the trainer's.",
        "mean exp |log p_train - log p_rollout| - 1; k3 = mean (r - 1 - log r), r = p_train / "
        "p_rollout",
        ("rollout_corr/token_mult_prob_error", "rollout_corr/k3_kl"),
        "every step",
        "correction/metrics.py",
    ),
    Source(
        "Response tokens whose importance weight was cut at the cap, and those left out.",
        keys=(
            "rollout_corr/rollout_is_ratio_fraction_high",
            "rollout_corr/rollout_rs_masked_fraction",
        ),
        over="every step",
        reference="correction/metrics.py",
    ),
    Source(
        "The scale that each layer's K and V cache was served with, and the largest share of any "
        "tensor that it clipped.",
        "clipped: |x| > 448 x scale",
        ("kv_scale/LAYER/k", "kv_scale/LAYER/v", "kv/saturation_max"),
        "every step",
    ),
    Source("Seconds of each phase, stacked.", keys=("time/PHASE",), over="every step"),
    Source(
        "Tokens sampled a second; time to quantize, send, load and prove the weights.",
        keys=("rollout/tokens_per_second", "sync/seconds"),
        over="every step",
    ),
    Source(
        "The norm of the gradient before it was clipped, mean over a step's minibatches.",
        keys=("grad_norm",),
        over="every step",
    ),
    Source(
        "How undecided the trainer's policy is about the tokens of the rollout.",
        keys=("policy/entropy",),
        over="every step",
    ),
    Source(
        "Choices of experts in which the engine's and the trainer's router agree.",
        "|top-k of both| / k, mean over tokens and layers",
        ("router/agreement", "router/top1_agreement"),
        "every step that measured it",
    ),
)


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


def panels(metrics: Sequence[Metrics], warn_saturation: float | None = None) -> Iterator[Panel]:
    """Each panel in a figure of its own, without a title."""
    import matplotlib
    from matplotlib.figure import Figure

    drawings: list[tuple[Draw, Source]] = list(
        zip([*_drawings(warn_saturation), gradients, entropy], SOURCES, strict=False)
    )
    if any("router/agreement" in line for line in metrics):
        drawings.append((routers, SOURCES[-1]))
    drawings += curves_drift.DRAWINGS if curves_drift.probed(metrics) else ()
    for draw, source in drawings:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=PANEL_INCHES, layout="constrained")
            axes = figure.subplots()
            _panel(axes, draw, metrics)
            title, note = axes.get_title("left"), axes.get_title("right")
            axes.set_title("")
            axes.set_title("", loc="right")
        yield Panel(figure, title, note, source)


def reward(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Mean reward of the training batches, and on the prompts never trained on."""
    axes.set_title("Reward")
    axes.set_ylabel("mean reward")
    train, heldout = series(metrics, "reward/train"), series(metrics, "reward/heldout")
    if not train[0] and not heldout[0]:
        return missing(axes, "no rewards yet")
    axes.plot(*train, color=SKY, label="train", marker=dot(train[0]))
    axes.plot(*heldout, color=BLUE, marker="o", markersize=4.5, label="held-out")
    for x, y in sorted({*zip(*heldout, strict=True)})[:: max(1, len(heldout[0]) - 1)]:  # ends
        axes.annotate(f"{y:.2f}", (x, y), (-2, -15), textcoords="offset points", color=BLUE)
    axes.set_ylim(-0.03, max(1.03, *train[1], *heldout[1]))
    axes.legend(loc="best")


def mismatch(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """How far the policy that sampled is from the policy that learns."""
    axes.set_title("Mismatch of rollout and trainer")
    axes.set_ylabel("log scale, no unit")
    k3 = series(metrics, "rollout_corr/k3_kl")
    steps, exp_abs = series(metrics, "rollout_corr/token_mult_prob_error")
    excess = (steps, [value - 1 for value in exp_abs])
    if not k3[0] and not steps:
        return missing(axes, "mismatch was not measured")
    drawn = [value for value in (*k3[1], *excess[1]) if value > 0]
    if not drawn:
        return missing(axes, "rollout and trainer are equal:\nthe mismatch is 0 at every step")
    axes.set_yscale("log", nonpositive="mask")
    axes.plot(*excess, color=VERMILION, label="mean exp|\u0394log p| \u2212 1", marker=dot(steps))
    axes.plot(*k3, color=BLUE, label="KL, k3 estimate (nats)", marker=dot(k3[0]))
    axes.axhline(ACCEPTABLE_EXCESS, color=VERMILION, linestyle=":", linewidth=1.2)
    axes.annotate(
        f"exp|\u0394log p| = {1 + ACCEPTABLE_EXCESS:.2f}: acceptable below",
        (0.01, ACCEPTABLE_EXCESS),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=VERMILION,
        fontsize=8.5,
        bbox=UNDERLAY,
    )
    low, high = min(drawn), max(*drawn, 2 * ACCEPTABLE_EXCESS)
    axes.set_ylim(low / 6, high * 1.5)  # room for the legend below
    axes.legend(loc="lower left", ncols=2, columnspacing=1.2, handlelength=1.6)


def corrected(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """The tokens whose importance weight the correction changed."""
    axes.set_title("Tokens truncated and rejected")
    axes.set_ylabel("% of response tokens")
    truncated = series(metrics, "rollout_corr/rollout_is_ratio_fraction_high")
    rejected = series(metrics, "rollout_corr/rollout_rs_masked_fraction")
    if not truncated[0] and not rejected[0]:
        return missing(axes, "no correction")
    for (steps, values), colour, name in (
        (truncated, VERMILION, "truncated"),
        (rejected, BLUE, "rejected"),
    ):
        label = f"{name}, mean {100 * mean(values):.2g} %" if steps else f"{name}: not measured"
        axes.plot(steps, [100 * v for v in values], color=colour, label=label, marker=dot(steps))
    top = 100 * max(*truncated[1], *rejected[1], 0.0001)
    axes.set_ylim(-0.04 * top, 1.35 * top)
    axes.legend(loc="upper left")


def phase_times(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Seconds of each phase, stacked."""
    axes.set_title("Time per step")
    axes.set_ylabel("seconds")
    names = phase_names(metrics)
    spans = {name: dict(zip(*series(metrics, f"time/{name}"), strict=True)) for name in names}
    timed = sorted({step for spent in spans.values() for step in spent})
    if not timed:
        return missing(axes, "no phase was timed")
    steps = range(int(timed[0]), int(timed[-1]) + 1)
    edges = [step - 0.5 for step in (*steps, steps.stop)]
    bottom = [0.0] * len(steps)
    for name, spent in spans.items():
        top = [low + spent.get(step, 0.0) for low, step in zip(bottom, steps, strict=True)]
        colour = PHASE_COLOURS.get(name, "black")
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=name)
        bottom = top
    axes.set_ylim(0, 1.4 * max(*bottom, 1e-3))
    axes.legend(loc="upper left", ncols=4, columnspacing=0.9, handlelength=1.0, handletextpad=0.5)


def speed(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Rollout tokens a second (left axis), and milliseconds of a weight sync (right axis)."""
    axes.set_title("Rollout speed and weight sync")
    tokens = series(metrics, "rollout/tokens_per_second")
    steps, seconds = series(metrics, "sync/seconds")
    if not tokens[0] and not steps:
        return missing(axes, "neither was measured")
    axes.plot(*tokens, color=BLUE, marker=dot(tokens[0]))
    axes.set_ylabel("rollout tokens/s", color=BLUE)
    axes.tick_params(axis="y", labelcolor=BLUE)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 1.25 * max(*tokens[1], 1.0))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.plot(steps, [1000 * s for s in seconds], color=VERMILION, marker=dot(steps))
    right.set_ylabel("weight sync, ms", color=VERMILION)
    right.tick_params(axis="y", labelcolor=VERMILION)
    right.set_ylim(0, 2.5e3 * max(*seconds, 1e-3))  # lower half: the two lines stay apart
    return None


def gradients(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """The norm of the gradient before clipping."""
    axes.set_title("Gradient norm")
    axes.set_ylabel("before clipping")
    _from_zero(axes, metrics, "grad_norm", "no gradient norms")


def entropy(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """The entropy of the trainer's policy on its rollouts."""
    axes.set_title("Entropy of the policy")
    axes.set_ylabel("nats a token")
    _from_zero(axes, metrics, "policy/entropy", "entropy was not measured")


def _from_zero(axes: Axes, metrics: Sequence[Metrics], key: str, absent: str) -> None:
    """One metric over the steps, from 0 up; ``absent`` is said where no step has it."""
    steps, values = series(metrics, key)
    if not steps:
        return missing(axes, absent)
    axes.plot(steps, values, color=BLUE, marker=dot(steps))
    axes.set_ylim(bottom=0)


def routers(axes: Axes, metrics: Sequence[Metrics]) -> None:
    """Shares of the choices of experts in which engine and trainer agree."""
    axes.set_title("Router agreement")
    axes.set_ylabel("% of choices")
    for key, colour, name in (
        ("router/agreement", BLUE, "top k"),
        ("router/top1_agreement", SKY, "first choice"),
    ):
        steps, shares = series(metrics, key)
        axes.plot(steps, [100 * v for v in shares], color=colour, label=name, marker=dot(steps))
    axes.legend(loc="lower left", ncols=2)


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
