"""`fp8rl bench kv-scales`: what recalibrating the KV-cache scales in each step costs.

    hook   seconds of a forward alone / of the same forward with an observer watching it
    step   (step - recalibration) / step, in real steps of the demo's loop with a live engine

Recalibration is the forward on the calibration tokens, the making of the scales, and the engine's
work to apply them and to prove that it holds them; in which phases of a step that falls depends on
who measures. kv_scales_forward.py and kv_scales_step.py do the measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fp8rl.bench.kv_scales_forward import AMAX, Shape, Timing, bench_forward
from fp8rl.bench.kv_scales_step import StepCost, bench_steps
from fp8rl.bench.result import BenchResult, Ratio, device_name
from fp8rl.config.run import RunConfig

HOOK_GOAL = 0.98  # at most 2 % of a forward for the hook itself
STEP_GOAL = 0.97  # at most 3 % of a step (2-3 % is what NVIDIA's blog on NeMo-RL reports)


def bench_kv_scales(
    shapes: Sequence[Shape],
    rounds: int,
    config: RunConfig,
    measured_by: Sequence[str],
    folder: Path,
    started: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure the hook on every shape, then the steps of one run for each way to measure.

    Args:
        shapes: models for the hook.
        rounds: turns of each way; ratios are taken within a round.
        config: the run whose steps are measured, as ``bench_steps`` takes it.
        measured_by: values of kv_scales.measured_by, each a run of its own.
        folder: gets the runs' folders.
        started: hears what is measured.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for shape in shapes:
        for timing in bench_forward(shape, rounds, started):
            rows += [_forward_row(timing, way) for way in timing.seconds]
            ratios |= _hook_ratios(timing)
    for way in measured_by:
        costs = bench_steps(config, way, folder / f"steps-{way}", started)
        rows.append({"part": "step", "measured_by": way, **_step_figures(costs)})
        ratios |= _step_ratios(way, costs)
    settings = {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "calibration_tokens": config.kv_scales.calibration_tokens,
        "shapes": {shape.name: shape.described() for shape in shapes},
    }
    return BenchResult("kv-scales", settings, ratios, rows, device_name(torch.device("cpu")))


def _forward_row(timing: Timing, way: str) -> dict[str, Any]:
    seconds = timing.seconds[way]
    where = {"part": "hook", "model": timing.model, "trainer": timing.trainer, "way": way}
    return {**where, "milliseconds": _milliseconds(seconds)}


def _hook_ratios(timing: Timing) -> dict[str, Ratio]:
    return {
        f"{timing.model}, {timing.trainer}: forward alone / {way}": Ratio.of(
            timing.alone, seconds, HOOK_GOAL if way == AMAX else None
        )
        for way, seconds in timing.watched.items()
    }


def _step_figures(costs: Sequence[StepCost]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for cost in costs for name in cost.phases))
    return {
        "steps": len(costs),
        "milliseconds": _milliseconds([cost.step for cost in costs]),
        "recalibration": _milliseconds([cost.recalibration for cost in costs]),
        "engine_scales": _milliseconds([cost.engine_scales for cost in costs]),
        "phases": {
            name: _milliseconds([cost.phases.get(name, 0.0) for cost in costs]) for name in names
        },
    }


def _step_ratios(way: str, costs: Sequence[StepCost]) -> dict[str, Ratio]:
    steps, updates = [cost.step for cost in costs], [cost.engine_update for cost in costs]
    without = [cost.step - cost.recalibration for cost in costs]
    bare = [cost.engine_update - cost.engine_scales for cost in costs]
    return {
        f"step without / with recalibration, measured by {way}": Ratio.of(
            without, steps, STEP_GOAL
        ),
        f"engine update without / with scales, measured by {way}": Ratio.of(bare, updates, None),
    }


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    median = sorted(seconds)[len(seconds) // 2]
    return {"median": 1e3 * median, "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)}
