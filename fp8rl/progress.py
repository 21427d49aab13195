"""What a run shows while it runs, and the clock of its phases.

On a terminal: a live table of the last steps, the phase that is running, and the time left.
Elsewhere (a log file, a pipe): one readable line a step, at most one every few seconds. Disabled
(the ranks other than 0): nothing is shown, and the phases are still measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Number = float | int | str
SHOWN_STEPS = 8  # rows of the live table
LINE_SECONDS = 3.0  # between two lines where there is no terminal
ETA_STEPS = 20  # recent steps whose mean pace gives the time left


def _fraction(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2g}%"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


# heading -> metric, and how its value is written
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "reward": ("reward/train", _fraction),
    "held-out": ("reward/heldout", _fraction),
    "KL k3": ("rollout_corr/k3_kl", lambda value: f"{value:.1e}"),
    "exp|dlp|": ("rollout_corr/token_mult_prob_error", lambda value: f"{value:.4f}"),
    "trunc.": ("rollout_corr/rollout_is_ratio_fraction_high", _percent),
    "reject.": ("rollout_corr/rollout_rs_masked_fraction", _percent),
    "sync ms": ("sync/seconds", _milliseconds),
    "tok/s": ("rollout/tokens_per_second", lambda value: f"{value:,.0f}"),
}


class Progress:
    """A context manager around a run's steps; see the module's docstring.

    Args:
        total_steps: the number of the last step.
        title: what is running, one line.
        console: where to show it.
        enabled: False shows nothing.
    """

    def __init__(
        self, total_steps: int, title: str, console: Console, *, enabled: bool = True
    ) -> None:
        self._total = total_steps
        self._title = title
        self._console = console
        self._enabled = enabled
        self._rows: deque[Mapping[str, Number]] = deque(maxlen=SHOWN_STEPS)
        self._running: list[tuple[str, float]] = []  # nested phases and when each began
        self._seconds: dict[str, float] = {}
        self._last_seconds: dict[str, float] = {}
        self._marks: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS)  # step, when it ended
        self._last_line = -LINE_SECONDS
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Open the display."""
        if self._enabled and self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console)
            self._live.start()
        elif self._enabled:
            self._print(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the display; what it showed last stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str, *, timed: bool = True) -> Iterator[None]:
        """Show ``name`` as running; if ``timed``, add the seconds to its time. May be nested."""
        began = time.perf_counter()
        self._running.append((name, began))
        try:
            yield
        finally:
            self._running.pop()
            if timed:
                spent = time.perf_counter() - began
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def phase_seconds(self) -> dict[str, float]:
        """Phase name -> seconds in it since the last ``step`` (or the start)."""
        return dict(self._seconds)

    def message(self, text: str) -> None:
        """Print a line that stays, above the live table."""
        if self._enabled:
            self._print(text)

    def step(self, metrics: Mapping[str, Number]) -> None:
        """Show a finished step's metrics (absent ones stay blank), and start the next's clocks."""
        self._rows.append(metrics)
        self._marks.append((int(metrics["step"]), time.perf_counter()))
        self._last_seconds, self._seconds = self._seconds, {}
        if self._live is not None:
            self._live.refresh()
        elif self._enabled:
            self._print_line(metrics)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self, metrics: Mapping[str, Number]) -> None:
        now = time.perf_counter()
        step = int(metrics["step"])
        rare = "reward/heldout" in metrics or step >= self._total
        if not rare and now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        cells = [f"{heading} {cell}" for heading, cell in zip(COLUMNS, _row(metrics), strict=True)]
        shown = [cell for cell in cells if not cell.endswith(" ")]
        self._print("  ".join([f"step {step}/{self._total}", *shown, f"ETA {self._left()}"]))

    def _left(self) -> str:
        """The time left, from the pace of the recent steps."""
        if len(self._marks) < 2:
            return "?"
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return clock((self._total - last) * (ended - began) / (last - first))

    def _render(self) -> RenderableType:
        done = int(self._rows[-1]["step"]) if self._rows else 0
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=self._total, completed=done, width=32),
            f"step {done}/{self._total}",
            f"ETA {self._left()}",
        )
        steps = Table(box=None, padding=(0, 1), header_style="dim")
        for heading in ("step", *COLUMNS):
            steps.add_column(heading, justify="right", no_wrap=True)
        for metrics in self._rows:
            steps.add_row(str(metrics["step"]), *_row(metrics))
        return Group(Text(self._title, style="bold"), head, steps, self._phases())

    def _phases(self) -> Text:
        """The phase that runs now, and what each took in the last step."""
        line = Text(" ")
        if self._running:
            name, began = self._running[-1]
            line.append(f"{name} {time.perf_counter() - began:.1f} s", style="bold green")
        if self._last_seconds:
            spent = "  ".join(f"{name} {s:.2f}" for name, s in self._last_seconds.items())
            line.append(f"   last step, s: {spent}", style="dim")
        return line


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _row(metrics: Mapping[str, Number]) -> list[str]:
    cells = []
    for key, write in COLUMNS.values():
        value = metrics.get(key)
        cells.append("" if value is None else write(float(value)))
    return cells
