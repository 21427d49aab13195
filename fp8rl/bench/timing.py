"""Time several ways of doing one thing so that their ratios can be trusted on a noisy machine.

All ways take turns, round by round, in an order drawn anew: what slows one round slows all of it,
and a ratio is taken within a round. A way is repeated within its turn until `MIN_SECONDS` have
passed; the first turns compile and warm caches, and do not count.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

from fp8rl.bench import memory

MIN_SECONDS = 0.05
WARMUP_TURNS = 2
MEMORY_CALLS = 3

Way = Callable[[], object]


def take_turns(
    ways: Mapping[str, Way],
    rounds: int,
    device: torch.device,
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return, for each way, the seconds of one call in each round; `done` is called after each."""
    repeats = {name: _repeats(way, device) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(_turn(ways[name], repeats[name], device) / repeats[name])
        done()
    return seconds


def temporary_bytes(way: Way, device: torch.device) -> int | None:
    """Return by how much memory rose at its highest while `way` ran, its result included.

    On a CPU this is the resident memory of the process, after the C library has given back what it
    keeps for reuse; the least of a few calls, for room that others' work has left in its heap can
    only add to it. None where the system cannot tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - held
    if not memory.can_tell():
        return None
    return min(_rise(way) for _ in range(MEMORY_CALLS))


def _rise(way: Way) -> int:
    memory.give_back()
    memory.start_high_water_mark()
    held = memory.high_water_mark()
    way()
    return memory.high_water_mark() - held


def _repeats(way: Way, device: torch.device) -> int:
    for _ in range(WARMUP_TURNS):
        _turn(way, 1, device)
    return max(1, round(MIN_SECONDS / max(_turn(way, 1, device), 1e-9)))


def _turn(way: Way, times: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        way()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
