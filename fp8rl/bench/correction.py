"""`fp8rl bench correction`: importance correction, loss and log-probs, beside veRL's and torch's.

The same tensors, in one process, by turns. Correction is with all its metrics, as a trainer logs
them each step; the loss and the log-probs with their gradient. Memory is what a call takes at its
highest beyond what was held before, its result included. What the ways compute is compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8rl.bench import correction_ways as ways
from fp8rl.bench.result import BenchResult, Ratio, device_name
from fp8rl.bench.timing import take_turns, temporary_bytes

SPEED_GOAL, MEMORY_GOAL = 3.0, 2.0  # against veRL's correction of a million tokens


def bench_correction(
    rows: int,
    columns: int,
    vocabulary: int,
    rounds: int,
    device: torch.device,
    started: Callable[[str], None] = lambda _: None,
    done: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Measure every case by every way; `started` hears each case, `done` each round."""
    figures: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for case in ways.cases(rows, columns, vocabulary, device):
        started(case.name)
        present = [w for w in case.prepare if w != ways.VERL or ways.has_verl()]
        calls = {way: case.prepare[way]() for way in present}
        expected = case.main_result(calls[ways.OURS]()).clone()
        seconds = take_turns(calls, rounds, device, done)
        taken = {way: temporary_bytes(call, device) for way, call in calls.items()}
        for way, call in calls.items():
            figures.append(
                {
                    "case": case.name,
                    "size": case.size,
                    "way": way,
                    "milliseconds": {
                        "median": 1e3 * statistics.median(seconds[way]),
                        "min": 1e3 * min(seconds[way]),
                        "max": 1e3 * max(seconds[way]),
                    },
                    "peak_mebibytes": _mebibytes(taken[way]),
                    "largest_difference": _apart(case.main_result(call()), expected),
                }
            )
        for way in present[1:]:
            ratios |= _ratios(case.name, way, seconds, taken)
    settings = {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "not_installed": [] if ways.has_verl() else ["verl"],
    }
    return BenchResult("correction", settings, ratios, figures, device_name(device))


def _ratios(
    case: str, way: str, seconds: dict[str, list[float]], taken: dict[str, int | None]
) -> dict[str, Ratio]:
    """Ours against `way`, by time and by memory; the goals are for the correction alone."""
    goals = case.startswith("correction") and way == ways.VERL
    speed = Ratio.of(seconds[way], seconds[ways.OURS], SPEED_GOAL if goals else None)
    found = {f"speed against {way}, {case}": speed}
    ours, other = taken[ways.OURS], taken[way]
    if ours and other:
        memory = Ratio.of([other], [ours], MEMORY_GOAL if goals else None)
        found[f"memory of {way} against ours, {case}"] = memory
    return found


def _mebibytes(taken: int | None) -> float | None:
    return None if taken is None else taken / 2**20


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
