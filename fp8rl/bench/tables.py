"""The table of ratios with which every benchmark's output ends."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table

from fp8rl.bench.result import BenchResult


def ratios_table(result: BenchResult, title: str, *, digits: int = 2) -> Table:
    """Each ratio's median, spread and goal."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in ("ratio (more is better)", "median", "min .. max", "goal"):
        table.add_column(heading, justify="left" if heading.startswith("ratio") else "right")
    for name, ratio in result.ratios.items():
        median, low, high = (f"{x:.{digits}f}" for x in (ratio.median, ratio.min, ratio.max))
        goal = "" if ratio.goal is None else f"{ratio.goal:.3g}"
        table.add_row(name, median, f"{low} .. {high}", goal)
    return table
