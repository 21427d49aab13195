"""A check of a run: what was looked at, what was found, what was asked for, and by whom.

A check is ``good``, ``watch`` or ``bad``, or ``unknown`` where the run measured too little. Levels
are judged by the worse of two means, over all steps and over the last fifth of them, so that a
run that goes wrong at its end is seen. The checks themselves are in ``checks_mismatch.py`` and
``checks_training.py``; what they amount to is in ``verdict.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fp8rl.report.data import Series
from fp8rl.report.page import Source, State

OURS = "our own choice"


@dataclass(frozen=True)
class Check:
    """One check; ``source`` says how the number is made and where its threshold is from."""

    name: str
    state: State
    found: str
    asks: str
    source: Source


def worse(series: Series, choose: Callable[[float, float], float]) -> float | None:
    """The worse of the mean over all steps and over the last fifth of them."""
    mean, recent = series.mean, series.recent.mean
    return None if mean is None or recent is None else choose(mean, recent)


def below(series: Series, good: float, bad: float) -> State:
    """Judge a level that should be low."""
    level = worse(series, max)
    if level is None:
        return "unknown"
    return "good" if level < good else "watch" if level <= bad else "bad"


def level(series: Series, show: Callable[[float], str]) -> str:
    """The mean in words, and that of the last steps where it is what was judged."""
    mean, recent = series.mean, series.recent.mean
    if mean is None or recent is None:
        return "not measured"
    return show(mean) if mean >= recent else f"{show(mean)}; {show(recent)} in the last steps"
