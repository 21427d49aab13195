"""The density of change of Gaussian masters: where every number is known beforehand.

Masters are N(0, sigma), fp32, some millions. A step moves each by 0.3 to 1 times the learning rate,
up or down, as Adam does where gradients are mostly noise. Two starts:

    settled       masters anywhere between the numbers that BF16 has; what density_theory.py expects
    checkpoint    masters that are BF16 numbers, as in a run that has just begun from a checkpoint;
                  the 1st, 10th and 100th step of it. BF16 copies begin by not moving until a master
                  has left its cell. FP8 codes depend on what is quantized: BF16 copies of the
                  masters move as little. Masters quantized as they are ("master") move twelve times
                  as much: one in sixteen lies exactly between two FP8 codes (a BF16 number has four
                  more bits of mantissa), and its first step, however small, decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8rl.bench.density_count import Counts, Held, compare
from fp8rl.bench.density_theory import Expected, expected_changes
from fp8rl.quant import FP32Source

SIGMAS = (0.02, 0.01)
SIDE = 2048
SMALLEST, LARGEST = 0.3, 1.0  # of an update, in learning rates
FROM_CHECKPOINT = (1, 10, 100)  # steps measured


@dataclass(frozen=True)
class SimulatedStep:
    """One step of Gaussian masters: what it changed, and what is to be expected.

    number: of the step since a BF16 checkpoint; None where the masters have settled.
    quantized: what was, BF16 copies of the masters ("export") or they themselves ("master").
    """

    sigma: float
    rate: float
    number: int | None
    quantized: FP32Source
    counts: Counts
    expected: Expected


def measure_settled(
    rates: Sequence[float],
    rounds: int,
    side: int = SIDE,
    started: Callable[[str], None] = lambda _: None,
) -> Iterator[SimulatedStep]:
    """Measure one step for each sigma and rate, `rounds` times with other masters."""
    for sigma in SIGMAS:
        started(f"simulated: sigma {sigma:g}")
        for seed in range(rounds):
            generator = torch.Generator().manual_seed(seed)
            before = torch.randn(side, side, generator=generator) * sigma
            for rate in rates:
                after = before + adam_update(before, rate, generator)
                yield _measured(before, after, sigma, rate, None, "export")


def measure_from_checkpoint(
    rate: float,
    steps: Sequence[int] = FROM_CHECKPOINT,
    side: int = SIDE,
    started: Callable[[str], None] = lambda _: None,
) -> Iterator[SimulatedStep]:
    """Measure the chosen steps since masters of the first sigma were BF16 numbers."""
    sigma = SIGMAS[0]
    started(f"simulated: from a BF16 checkpoint, {max(steps)} steps")
    generator = torch.Generator().manual_seed(0)
    masters = (torch.randn(side, side, generator=generator) * sigma).bfloat16().float()
    for number in range(1, max(steps) + 1):
        after = masters + adam_update(masters, rate, generator)
        if number in steps:
            yield _measured(masters, after, sigma, rate, number, "export")
            yield _measured(masters, after, sigma, rate, number, "master")
        masters = after


def adam_update(masters: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the update of one step for masters of any shape: see above."""
    size = torch.empty_like(masters).uniform_(SMALLEST, LARGEST, generator=generator)
    up = torch.randint(2, masters.shape, generator=generator)
    return rate * size * (2 * up - 1)


def _measured(
    before: Tensor,
    after: Tensor,
    sigma: float,
    rate: float,
    number: int | None,
    quantized: FP32Source,
) -> SimulatedStep:
    values = [x.bfloat16() if quantized == "export" else x for x in (before, after)]
    was = Held.of(values[0], quantized=True, last=None)
    counts = compare(was, Held.of(values[1], quantized=True, last=was))
    expected = expected_changes(before, after, quantized=True)
    return SimulatedStep(sigma, rate, number, quantized, counts, expected)
