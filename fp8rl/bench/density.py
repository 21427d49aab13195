"""`fp8rl bench density`: what one optimizer step changes of a model, in BF16 and in FP8.

    share      stored values that differ from the step before / all of that kind: BF16 elements,
               FP8 codes (one byte each), block scales
    delta      bytes of the encoded deltas (sync/delta.py) / bytes of the model in BF16; to an FP8
               engine (codes and scales of the linears, the rest BF16), and to a BF16 engine
    expected   the share that the step's updates let expect (density_theory.py)

A step is one AdamW update of fp32 masters, exported to BF16 and quantized from there, as the loop
publishes it. In the real loop (density_loop.py) each kind of tensor is counted by itself; tensors
of this small model are small, so headers take a good part of their deltas. Of its embedding three
rows in four belong to tokens that never occur, and do not move. Gaussian masters
(density_simulated.py) are of the size of real layers, and check the counting: theory and count
must agree. Sticky scales (quant/sticky.py) are counted beside fresh ones on the same steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fp8rl.bench.density_count import ALL, Counts
from fp8rl.bench.density_loop import SETTLING, LoopStep, measure_loop
from fp8rl.bench.density_simulated import (
    SIDE,
    SIGMAS,
    SimulatedStep,
    measure_from_checkpoint,
    measure_settled,
)
from fp8rl.bench.density_theory import Expected
from fp8rl.bench.result import BenchResult, Ratio, device_name
from fp8rl.config.run import RunConfig

RATES = (1e-6, 3e-6, 1e-5)
ROUNDS = 3  # of other Gaussian masters
GOAL = 400.0  # a delta of 0.25 % of the BF16 bytes, at sigma 0.02 and learning rate 1e-6


def bench_density(
    config: RunConfig,
    steps: int,
    folder: Path,
    *,
    rates: Sequence[float] = RATES,
    side: int = SIDE,
    started: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure Gaussian masters, then the run that `config` describes.

    Args:
        config: the run; learning rate, minibatches and number of steps are the bench's own.
        steps: measured in the loop at each rate; 0 leaves the loop out.
        folder: gets the run's folder, ``loop``.
        rates: learning rates; the first is that of the goal.
        side: of the Gaussian matrices; half of it for those that take many steps.
        started: hears what is measured.
    """
    settled = list(measure_settled(rates, ROUNDS, side, started))
    begun = list(measure_from_checkpoint(rates[0], side=side // 2, started=started))
    loop: list[LoopStep] = []
    if steps:
        loop = list(measure_loop(config, rates, steps, folder / "loop", started))
    rows = [_simulated_row(settled, sigma, rate) for sigma in SIGMAS for rate in rates]
    rows += [_begun_row(each) for each in begun]
    rows += [
        _loop_row(loop, rate, kind) for rate in rates for kind in (loop[0].counts if loop else ())
    ]
    ratios: dict[str, Ratio] = {}
    for rate in rates:
        for sigma in SIGMAS:
            counts = [s.counts for s in settled if (s.sigma, s.rate) == (sigma, rate)]
            goal = GOAL if (sigma, rate) == (SIGMAS[0], rates[0]) else None
            ratios |= _ratios(f"N(0, {sigma:g}), rate {rate:g}", counts, goal)
        counts = [s.counts[ALL] for s in loop if s.rate == rate]
        ratios |= _ratios(f"loop, rate {rate:g}", counts, None) if counts else {}
    settings = {
        "threads": torch.get_num_threads(),
        "rates": list(rates),
        "simulated": f"{ROUNDS} rounds of {side} x {side}",
        "loop": f"{SETTLING} steps to settle, {steps} at each rate",
    }
    return BenchResult("density", settings, ratios, rows, device_name(torch.device("cpu")))


def _ratios(where: str, counts: Sequence[Counts], goal: float | None) -> dict[str, Ratio]:
    """Ratios of bytes, step by step."""
    whole, fp8 = [float(c.bf16_bytes) for c in counts], [float(c.fp8_delta) for c in counts]
    bf16, sticky = [float(c.bf16_delta) for c in counts], [float(c.sticky_delta) for c in counts]
    return {
        f"{where}: BF16 bytes / FP8 delta": Ratio.of(whole, fp8, goal),
        f"{where}: BF16 delta / FP8 delta": Ratio.of(bf16, fp8, None),
        f"{where}: FP8 delta / that with sticky scales": Ratio.of(fp8, sticky, None),
    }


def _simulated_row(steps: Sequence[SimulatedStep], sigma: float, rate: float) -> dict[str, Any]:
    chosen = [s for s in steps if (s.sigma, s.rate) == (sigma, rate)]
    where = {"part": "simulated", "sigma": sigma, "rate": rate, "start": "settled"}
    figures = [_figures(s.counts, s.expected, s.rate) for s in chosen]
    return {**where, "quantized": "export", **_means(figures)}


def _begun_row(step: SimulatedStep) -> dict[str, Any]:
    where = {"part": "simulated", "sigma": step.sigma, "rate": step.rate, "start": "checkpoint"}
    figures = _figures(step.counts, step.expected, step.rate)
    return {**where, "step": step.number, "quantized": step.quantized, **figures}


def _loop_row(steps: Sequence[LoopStep], rate: float, kind: str) -> dict[str, Any]:
    chosen = [s for s in steps if s.rate == rate]
    figures = [_figures(s.counts[kind], s.expected[kind], rate) for s in chosen]
    where = {"part": "loop", "rate": rate, "kind": kind, "steps": len(chosen)}
    return {**where, **_means(figures)}


def _figures(counts: Counts, expected: Expected, rate: float) -> dict[str, Any]:
    """Shares of one step; `update` is the mean |update| in learning rates."""
    return {
        "elements": counts.elements,
        "codes": counts.codes,
        "scales": counts.scales,
        **counts.shares(),
        "elements_expected": expected.elements / counts.elements,
        "codes_expected": None if expected.codes is None else expected.codes / counts.codes,
        "update": expected.update / counts.elements / rate,
    }


def _means(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over the steps; None where there is none."""
    return {
        name: None if first is None else statistics.fmean(each[name] for each in figures)
        for name, first in figures[0].items()
    }
