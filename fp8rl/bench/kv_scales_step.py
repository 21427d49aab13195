"""The step's cost: real steps of the demo's loop, with the clock of their phases.

The trainer, the engine and the steps are those of ``fp8rl train``; nothing is evaluated or saved,
which would hide the cost. Of a step belong to the recalibration:

    observe      the phase in which the trainer measures; next to nothing where the engine does
    measuring    what the engine took to measure, in the middle of the publish
    scales       what the engine took to set its scales and to read them back
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from fp8rl.config.run import RunConfig
from fp8rl.loop import step
from fp8rl.run_dir import Metrics
from fp8rl.session import Session, open_session

WARMUP_STEPS = 2


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step.

    phases: all of them. engine_measuring, engine_scales: parts of the phase publish.
    engine_update: the engine's whole work on the update, but for measuring.
    """

    phases: dict[str, float]
    engine_measuring: float
    engine_scales: float
    engine_update: float

    @property
    def step(self) -> float:
        """The whole step."""
        return sum(self.phases.values())

    @property
    def recalibration(self) -> float:
        """What would not be done if the scales stayed as they are."""
        return self.phases["observe"] + self.engine_measuring + self.engine_scales


def bench_steps(
    config: RunConfig,
    measured_by: str,
    folder: Path,
    started: Callable[[str], None] = lambda _: None,
) -> list[StepCost]:
    """Run ``config.steps`` steps after `WARMUP_STEPS`, in a run of its own in ``folder``.

    `started` hears what is measured. What the run prints goes to standard error.
    """
    started(f"steps, scales measured by the {measured_by}")
    last = config.steps + WARMUP_STEPS
    chosen = {
        "run_dir": folder,
        "steps": last + 1,  # the last version is only evaluated
        "eval_every": last + 1,
        "kv_scales": config.kv_scales.model_copy(update={"measured_by": measured_by}),
    }
    costs = []
    with (
        redirect_stdout(sys.stderr),
        open_session(config.model_copy(update=chosen), resume=False, command="") as run,
    ):
        for version in range(last):
            costs.append(_cost(run, version))
    return costs[WARMUP_STEPS:]


def _cost(run: Session, version: int) -> StepCost:
    assert run.engine is not None  # the bench has one trainer rank
    metrics: Metrics = step(run, version)
    run.record(metrics)
    [worker] = run.engine.worker_report()
    prefix = "time/"
    return StepCost(
        phases={
            name.removeprefix(prefix): float(value)
            for name, value in metrics.items()
            if name.startswith(prefix) and name != "time/step"
        },
        engine_measuring=float(metrics["sync/kv_seconds"]),
        engine_scales=worker["seconds"]["kv_scales"],
        engine_update=float(metrics["sync/engine_seconds"]),
    )
