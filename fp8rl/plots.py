"""The colours and the style that all pictures share.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. matplotlib is not imported
here: ``STYLE`` is what its ``rc_context`` takes.
"""

from __future__ import annotations

from typing import Any

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#6E6E6E"
GRID = "#E4E4E4"
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
STYLE: dict[Any, Any] = {  # matplotlib types its keys as a union of literals
    "font.size": 10.0,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}
