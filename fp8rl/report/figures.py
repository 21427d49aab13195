"""Matplotlib figures as parts of a page: inline SVG, real text, colours that follow the page's.

``figure(drawing, title, source)`` takes a figure of one panel; its colours are those of
``fp8rl/plots.py``, and each becomes a CSS variable that has another value in the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from markupsafe import Markup

from fp8rl import plots
from fp8rl.report.page import Source, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAINTS = {
    "#000000": "currentColor",
    "#ffffff": "var(--paper)",
    plots.GRID: "var(--line)",
    plots.GREY: "var(--dim)",
    plots.BLUE: "var(--blue)",
    plots.VERMILION: "var(--vermilion)",
    plots.GREEN: "var(--green)",
    plots.ORANGE: "var(--orange)",
    plots.SKY: "var(--sky)",
    plots.PURPLE: "var(--purple)",
    plots.YELLOW: "var(--yellow)",
}
PANEL_INCHES = (5.2, 3.1)


def figure(drawing: Figure, title: str, note: str, source: Source) -> Markup:
    """A figure under its title, with a note beside the title and its source behind a click."""
    text = Markup(
        "<figure><figcaption><b>{}</b> <span>{}</span></figcaption>{}"
        '<details class="why"><summary>where this is from</summary>{}</details></figure>'
    )
    return text.format(title, note, svg(drawing, title), provenance(source))


def figure_row(figures: Iterable[Markup]) -> Markup:
    """Figures side by side where there is room."""
    return Markup('<div class="figures">{}</div>').format(Markup("\n").join(figures))


def svg(drawing: Figure, label: str) -> Markup:
    """A figure as one ``<svg>`` element that scales to its column."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(plots.STYLE | {"svg.hashsalt": label}):  # ids of its own, always
        drawing.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # nothing refers to them, and panels repeat them
    for hexadecimal, paint in PAINTS.items():
        drawn = re.sub(hexadecimal, paint, drawn, flags=re.IGNORECASE)
    opened = Markup('<svg role="img" aria-label="{}"').format(label)
    return Markup(drawn.replace("<svg", opened, 1))


def paint(colour: str) -> str:
    """The page's name of a colour of ``fp8rl/plots.py``."""
    return PAINTS.get(colour, colour)
