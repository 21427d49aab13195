"""The density of change in the project's own RL loop, one optimizer step after another.

Trainer, task, rollout engine and loss are those of ``fp8rl train``: a supervised warm-up to a start
where reward is low, `SETTLING` RL steps so that Adam's moments are those of RL gradients, and from
there, for each learning rate, some more. One optimizer step is taken on each batch of rollouts, so
two versions that follow one another are one step apart. The masters come out of the warm-up's fp32
updates, anywhere between the numbers that BF16 has, as in a run that has gone on for a while.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fp8rl.bench.density_count import (
    ALL,
    KINDS,
    Counts,
    Held,
    compare_models,
    kind_of,
)
from fp8rl.bench.density_theory import Expected, expected_changes
from fp8rl.config.run import RunConfig
from fp8rl.loop import step
from fp8rl.quant import QuantPlan
from fp8rl.serving import engine_settings
from fp8rl.session import Session, open_session
from fp8rl.trainer.megatron import MegatronTrainer

SETTLING = 20  # steps, as long as the longer of Adam's memories
MASTER = "master/"  # masters in the trainer's state
QUANTIZED = ("attention", "MLP")


@dataclass(frozen=True)
class LoopStep:
    """One optimizer step: what it changed, by kind, and what its masters let expect."""

    rate: float
    counts: dict[str, Counts]
    expected: dict[str, Expected]


def measure_loop(
    config: RunConfig,
    rates: Sequence[float],
    steps: int,
    folder: Path,
    started: Callable[[str], None] = lambda _: None,
) -> Iterator[LoopStep]:
    """Measure `steps` steps at each rate, in a run of its own in `folder`.

    `started` hears what is measured. What the run prints goes to standard error.
    """
    settling = _at_rate(config, folder, rates[0], steps=SETTLING + len(rates) * steps)
    started(f"loop: warm-up, then {SETTLING} steps to settle")
    with (
        redirect_stdout(sys.stderr),
        open_session(settling, resume=False, command="") as run,
    ):
        version = 0
        for _ in range(SETTLING):
            run.record(step(run, version))
            version += 1
        settled = run.trainer.state()
        for rate in rates:
            started(f"loop: learning rate {rate:g}")
            run.trainer.load_state(settled)
            there = dataclasses.replace(run, config=_at_rate(config, folder, rate, settling.steps))
            yield from _steps(there, version, steps, rate)
            version += steps


def _at_rate(config: RunConfig, folder: Path, rate: float, steps: int) -> RunConfig:
    """The run: `steps` and one more version, one optimizer step each, evaluated once."""
    trainer = config.trainer.model_copy(update={"learning_rate": rate, "minibatches": 1})
    chosen = {"run_dir": folder, "steps": steps + 1, "eval_every": steps + 2, "trainer": trainer}
    return config.model_copy(update=chosen)


def _steps(run: Session, version: int, steps: int, rate: float) -> Iterator[LoopStep]:
    plan = engine_settings(run.config, run.task).plan()
    held, masters = _held(run.trainer, plan, {}), _masters(run.trainer)
    for number in range(version, version + steps):
        run.record(step(run, number))
        now, masters_now = _held(run.trainer, plan, held), _masters(run.trainer)
        yield LoopStep(rate, compare_models(held, now), _expected(masters, masters_now))
        held, masters = now, masters_now


def _held(trainer: MegatronTrainer, plan: QuantPlan, last: dict[str, Held]) -> dict[str, Held]:
    return {
        name: Held.of(tensor, quantized=plan.is_quantized(name), last=last.get(name))
        for name, tensor in trainer.source()
    }


def _masters(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """The fp32 masters under Megatron's names: q, k and v are one tensor, and gate and up."""
    state = trainer.state()
    return {n.removeprefix(MASTER): t for n, t in state.items() if n.startswith(MASTER)}


def _expected(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Expected]:
    found: dict[str, list[Expected]] = {kind: [] for kind in (*KINDS.values(), ALL)}
    for name, master in before.items():
        kind = kind_of(name)
        quantized = kind in QUANTIZED and master.ndim == 2
        expected = expected_changes(master, after[name], quantized=quantized)
        found[kind].append(expected)
        found[ALL].append(expected)
    return {kind: _sum(each) for kind, each in found.items() if each}


def _sum(expected: Sequence[Expected]) -> Expected:
    codes = [e.codes for e in expected if e.codes is not None]
    return Expected(
        sum(e.elements for e in expected),
        sum(codes) if codes else None,
        sum(e.update for e in expected),
    )
