"""The panel of the KV-cache scales, and of what they clip."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fp8rl.plots import VERMILION
from fp8rl.report.drawing import dot, missing, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fp8rl.run_dir import Metrics

SPREAD_OCTAVES = 0.5  # height over which lines at one and the same scale are drawn side by side
LEAST_SATURATION = 1e-6  # share below which the axis is linear, down to 0
KV_SCALE = re.compile(r"kv_scale/(\d+)/([kv])")


def kv_scales(axes: Axes, metrics: Sequence[Metrics], warn_saturation: float | None = None) -> None:
    """The scale of each layer's K and V cache, and below (right axis) what the scales clip.

    Lines that would coincide are spread a little.
    """
    axes.set_title("KV-cache scales")
    axes.set_ylabel("scale (lines spread)", loc="top")
    names = {match.groups() for line in metrics for key in line if (match := KV_SCALE.match(key))}
    lines = sorted((int(layer), kind) for layer, kind in names)
    if not lines:
        return missing(axes, "BF16 KV cache: no scales")
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
        steps, scales = series(metrics, f"kv_scale/{layer}/{kind}")
        changes += sum(a != b for a, b in pairwise(scales))
        offset = SPREAD_OCTAVES * ((index + 0.5) / len(lines) - 0.5)
        heights = [math.log2(scale) + offset if scale > 0 else math.nan for scale in scales]
        named = len(layers) <= 4 or layer in (layers[0], layers[-1])
        axes.step(
            steps,
            heights,
            where="post",
            color=colormaps["viridis"](0.3 + 0.55 * layers.index(layer) / max(1, len(layers) - 1)),
            linestyle="-" if kind == "k" else (0, (4, 1.5)),
            marker=dot(steps),
            label=f"{kind}{layer}" if named else None,
        )
        drawn += [height for height in heights if math.isfinite(height)]
    return drawn, changes


def _saturation(axes: Axes, metrics: Sequence[Metrics], warn_saturation: float | None) -> None:
    """The highest saturation of any layer's q, k or v, in the lowest third, with the threshold."""
    steps, shares = series(metrics, "kv/saturation_max")
    if not steps:
        return
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.set_yscale("symlog", linthresh=LEAST_SATURATION)
    right.set_ylim(-0.3 * LEAST_SATURATION, 1e12)
    right.plot(steps, shares, color=VERMILION, marker=dot(steps))
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
