"""The figures of `fp8rl bench rollout`: rows and ratios, from the rounds that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fp8rl.bench.result import Ratio
from fp8rl.bench.rollout_arms import ARMS, BF16, FP8, Point, Round, Turn
from fp8rl.config.rollout import FP8_CACHE

SMALL_BATCH, SMALL_GOAL, LARGE_BATCH, LARGE_GOAL = 8, 1.25, 32, 1.0
GOAL_WEIGHTS = (0.25e9, 0.7e9)
CAPACITY_GOAL = 2.0
PERCENTILES = (50, 90, 99)
SAME = {"kv_tokens_same_kv": "the same KV bytes", "kv_tokens_same_memory": "the same memory in all"}


def rows_of(rounds: Sequence[Round], described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each point and arm, then one for each arm's memory."""
    rows = [_row(point, arm, turns) for point, arm, turns in _turns(rounds, described["arms"])]
    return [*rows, *(_memory_row(arm, rounds, described) for arm in described["arms"])]


def ratios_of(rounds: Sequence[Round], described: Mapping[str, Any]) -> dict[str, Ratio]:
    """Each arm's tokens a second by BF16's, round by round; and tokens of the cache."""
    speeds = {
        (point, arm): [turn.tokens / turn.seconds for turn in turns]
        for point, arm, turns in _turns(rounds, described["arms"])
    }
    low, high = GOAL_WEIGHTS
    aimed = not described["cuda"] and low <= described["weights"] <= high
    ratios = {}
    for (point, arm), speed in speeds.items():
        if arm != BF16:
            name = f"{arm} / {BF16}, tokens/s, {point_name(point)}"
            simple = aimed and arm == FP8 and not point.update_every
            goal = _goal(point) if simple and point.tokens == described["tokens"] else None
            ratios[name] = Ratio.of(speed, speeds[point, BF16], goal)
    memory = {arm: _memory_row(arm, rounds, described) for arm in described["arms"]}
    for arm, row in memory.items():
        for key, words in SAME.items():
            if arm != BF16:
                above, below = [float(row[key])], [float(memory[BF16][key])]
                cached = key == "kv_tokens_same_kv" and ARMS[arm][0] in FP8_CACHE
                goal = CAPACITY_GOAL if cached else None
                ratios[f"{arm} / {BF16}, KV tokens in {words}"] = Ratio.of(above, below, goal)
    return ratios


def point_name(point: Point) -> str:
    """A point in words."""
    updates = {0: "", 1: ", an update before each"}
    several = f", an update before every {point.update_every}"
    return f"{point.batch} x {point.tokens}{updates.get(point.update_every, several)}"


def _goal(point: Point) -> float | None:
    if point.batch <= SMALL_BATCH:
        return SMALL_GOAL
    return LARGE_GOAL if point.batch == LARGE_BATCH else None


def _turns(rounds: Sequence[Round], arms: Sequence[str]) -> Iterator[tuple[Point, str, list[Turn]]]:
    """For each point and arm its turns, in the order of rounds."""
    turns = [turn for round_ in rounds for turn in round_.turns]
    for point in dict.fromkeys(turn.point for turn in turns):
        for arm in arms:
            yield point, arm, [turn for turn in turns if (turn.point, turn.arm) == (point, arm)]


def _row(point: Point, arm: str, turns: Sequence[Turn]) -> dict[str, Any]:
    cores = [turn.core_seconds for turn in turns if turn.core_seconds is not None]
    row: dict[str, Any] = {
        "part": "speed",
        "arm": arm,
        **asdict(point),
        "tokens_per_second": _spread([turn.tokens / turn.seconds for turn in turns]),
        "first_token_seconds": _percentiles([x for turn in turns for x in turn.first]),
        "output_token_seconds": _percentiles([x for turn in turns for x in turn.each]),
        "preemptions": sum(turn.preemptions for turn in turns),
        "cores": None,
        "core_seconds_per_token": None,
    }
    if cores:
        row["cores"] = statistics.median(c / t.seconds for c, t in zip(cores, turns, strict=True))
        per_token = [c / t.tokens for c, t in zip(cores, turns, strict=True)]
        row["core_seconds_per_token"] = _spread(per_token)
    if point.update_every:
        row["update_seconds"] = statistics.median(turn.update for turn in turns)
        row["recalibration_seconds"] = statistics.median(turn.recalibration for turn in turns)
    return row


def _memory_row(arm: str, rounds: Sequence[Round], described: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens of the cache as started, in BF16's KV bytes, and in BF16's memory in all."""
    seen = [round_.memory[arm] for round_ in rounds]
    bytes_, tokens = seen[0]["kv_bytes"], seen[0]["kv_tokens"]
    base = rounds[0].memory[BF16]["kv_bytes"]
    assert bytes_ and tokens and base  # vLLM's own figures, of a cache that served
    freed = described["weight_bytes"][BF16] - described["weight_bytes"][arm]
    resident = [m["resident_bytes"] for m in seen if m["resident_bytes"] is not None]
    return {
        "part": "memory",
        "arm": arm,
        "weight_bytes": described["weight_bytes"][arm],
        "kv_bytes": bytes_,
        "kv_tokens": tokens,
        "kv_tokens_same_kv": base * tokens // bytes_,
        # on CUDA every arm was given the same memory in all
        "kv_tokens_same_memory": tokens if described["cuda"] else (base + freed) * tokens // bytes_,
        "resident_bytes": max(resident) if resident else None,
        "device_bytes": max(m["device_bytes"] or 0 for m in seen),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Of all requests of all rounds; None where there are none (responses of one token)."""
    if not values:
        return None
    found = np.percentile(np.asarray(values), PERCENTILES)
    return {f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}
