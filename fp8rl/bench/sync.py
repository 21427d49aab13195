"""`fp8rl bench sync`: our publish against what else brings new weights into an engine.

    goals   full           at most 3 times memcpy and load; a third of BF16, quantized there
            delta          at most 0.5 % of the BF16 bytes, and there sooner than a full version
            fingerprints   at most a twentieth of a full publish, both sides together

All ways take turns in each round, in an order drawn anew, with the same weights, one optimizer step
after those of the round before; ratios are taken within a round. Trainer and engines are processes
of their own, as in a run, and share the machine's cores. Two rounds come first that are not timed:
one warms up, one looks how much memory a turn takes. sync_ways.py has the ways and the phases,
sync_contest.py what surrounds them.

Memory is what is resident on top of what was before: ``kept`` from one turn to the next (ring,
ledger, mirror, buffers), ``peak`` on top of that within a turn. Shared memory counts on both sides.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from fp8rl.bench.result import BenchResult, Ratio, device_name
from fp8rl.bench.sync_contest import WAYS, Contest, Taken
from fp8rl.bench.sync_model import LEARNING_RATE, SIGMA, Shape, Sizes
from fp8rl.bench.sync_ways import (
    CODES,
    DELTA,
    DISK,
    ENCODE,
    FLOOR,
    FULL,
    PHASES,
    SCALES,
    THERE,
    TRANSPORT,
    VERIFY,
    Turn,
)
from fp8rl.errors import ConfigError

FLOOR_GOAL, THERE_GOAL = 1 / 3, 3.0
DELTA_GOAL, DELTA_AIM = 200.0, 400.0  # 0.5 % of the BF16 bytes; 0.25 %
FINGERPRINT_GOAL = 20.0
MEMCPY, FINGERPRINTS = "memcpy alone", "fingerprints"  # rows beside the ways
BREAK_EVEN = "link on which a delta is as soon"
CODING = (ENCODE, TRANSPORT, VERIFY)  # the phases that are other ones in a delta
SHOWN = (FULL, DELTA, THERE, DISK, FLOOR)  # in this order


@dataclass(frozen=True)
class Measured:
    """All timed turns by way; seconds that fingerprints took on both sides, by round; memory.

    kept, peak: way -> bytes; None where the system cannot tell.
    """

    turns: Mapping[str, Sequence[Turn]]
    fingerprints: Sequence[tuple[float, float]]
    kept: Mapping[str, Taken | None] = field(default_factory=dict)
    peak: Mapping[str, Taken | None] = field(default_factory=dict)


def bench_sync(
    shape: Shape,
    rounds: int,
    folder: Path,
    started: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Measure every way on a model of that shape.

    Args:
        shape: of the model.
        rounds: turns of each way that are timed.
        folder: gets the engines' logs, and for a while a checkpoint.
        started: hears what is done.

    Raises:
        ConfigError: memory does not suffice; nothing was started.
        EngineError: an engine failed, or ways that should bring the same bytes do not.
    """
    sizes = shape.sizes()
    refuse_without_memory(shape.name, sizes.memory_needed(), psutil.virtual_memory().available)
    with ExitStack() as stack:
        started(f"{sizes.weights / 1e6:,.0f} M weights, three engines start")
        contest = Contest(shape, folder, stack)
        measured = measure(contest, rounds, started)
    settings = {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "shape": f"{shape.name}: {shape.described()}",
        **asdict(sizes),
        "sigma": SIGMA,
        "learning_rate": LEARNING_RATE,
        "reload_weights": "vLLM quantizes online: fp8_per_block, fp32 scales",
    }
    rows, ratios = rows_of(measured), ratios_of(measured, sizes)
    return BenchResult("sync", settings, ratios, rows, device_name(torch.device("cpu")))


def refuse_without_memory(name: str, needed: int, available: int) -> None:
    """Raise ConfigError where memory does not suffice."""
    if needed > available:
        raise ConfigError(
            f"a model of shape {name} in one trainer and three engines takes some "
            f"{needed / 2**30:.0f} GiB, and {available / 2**30:.1f} GiB are free; choose a smaller "
            "--shape, or end what else takes memory"
        )


def measure(contest: Contest, rounds: int, started: Callable[[str], None]) -> Measured:
    """Open the ways, look at their memory, and let them take turns."""
    kept, peak = {}, {}
    for name in WAYS:
        started(f"warming up: {name}")
        kept[name] = contest.open(name)
    contest.step()
    for name in WAYS:
        started(f"memory: {name}")
        peak[name] = contest.peak(name)
    turns: dict[str, list[Turn]] = {name: [] for name in WAYS}
    fingerprints = []
    order, shuffle = list(WAYS), random.Random(0)
    for number in range(1, rounds + 1):
        started(f"round {number} of {rounds}: an optimizer step")
        contest.step()
        shuffle.shuffle(order)
        for name in order:
            started(f"round {number} of {rounds}: {name}")
            turns[name].append(contest.turn(name))
        fingerprints.append(contest.fingerprints())
    return Measured(turns, fingerprints, kept, peak)


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """One row for each way, then one of the memcpy alone and one of the fingerprints."""
    rows = [_row(name, measured.turns[name], measured) for name in SHOWN]
    copies = [turn.phases[TRANSPORT] for turn in measured.turns[FLOOR]]
    here, there = zip(*measured.fingerprints, strict=True)
    both = [a + b for a, b in measured.fingerprints]
    full, delta = measured.turns[FULL], measured.turns[DELTA]
    link = statistics.median(break_even(a, b) for a, b in zip(full, delta, strict=True))
    sides = {"trainer": statistics.median(here), "engine": statistics.median(there)}
    return [
        *rows,
        {"part": MEMCPY, "seconds": _spread(copies)},
        {"part": FINGERPRINTS, "seconds": _spread(both), **sides},
        {"part": BREAK_EVEN, "gigabytes_per_second": None if math.isinf(link) else link},
    ]


def ratios_of(measured: Measured, sizes: Sizes) -> dict[str, Ratio]:
    """What is held against goals, and what else is worth knowing."""
    seconds = {name: [t.seconds for t in turns] for name, turns in measured.turns.items()}
    full, delta = seconds[FULL], seconds[DELTA]
    coding = [sum(t.phases[p] for p in CODING) for t in measured.turns[DELTA]]
    prints = [a + b for a, b in measured.fingerprints]
    sent = [float(sum(turn.wire.values())) for turn in measured.turns[DELTA]]
    of_fp8 = [float(turn.wire[CODES] + turn.wire[SCALES]) for turn in measured.turns[DELTA]]
    whole, quantized = [2.0 * sizes.weights] * len(sent), [2.0 * sizes.quantized] * len(sent)
    bytes_sent = "BF16 bytes / bytes of a delta"
    return {
        f"{FLOOR} / {FULL}": Ratio.of(seconds[FLOOR], full, FLOOR_GOAL),
        f"{THERE} / {FULL}": Ratio.of(seconds[THERE], full, THERE_GOAL),
        f"{DISK} / {FULL}": Ratio.of(seconds[DISK], full, None),
        f"{FULL} / {DELTA}": Ratio.of(full, delta, 1.0),
        f"{FULL} / encoding and applying a delta": Ratio.of(full, coding, 1.0),
        f"{THERE} / {DELTA}": Ratio.of(seconds[THERE], delta, None),
        bytes_sent: Ratio.of(whole, sent, DELTA_GOAL),
        f"{bytes_sent}, FP8 weights alone": Ratio.of(quantized, of_fp8, DELTA_AIM),
        f"{FULL} / its {FINGERPRINTS}": Ratio.of(full, prints, FINGERPRINT_GOAL),
    }


def break_even(full: Turn, delta: Turn) -> float:
    """GB/s of a link that would make both take the same time; a delta is sooner on slower ones.

    Shared memory carries bytes for next to nothing; inf where a delta is sooner even there.
    """
    saved = sum(full.wire.values()) - sum(delta.wire.values())
    lost = delta.seconds - full.seconds
    return saved / lost / 1e9 if lost > 0 else math.inf


def _row(name: str, turns: Sequence[Turn], measured: Measured) -> dict[str, Any]:
    """Medians of a way's turns; bytes of the wire are those of the median turn."""
    phases = {
        phase: statistics.median(turn.phases[phase] for turn in turns)
        for phase in PHASES
        if phase in turns[0].phases
    }
    wire = sorted((turn.wire for turn in turns), key=lambda w: sum(w.values()))[len(turns) // 2]
    row: dict[str, Any] = {"part": name, "seconds": _spread([turn.seconds for turn in turns])}
    row |= {"phases": phases, "wire_bytes": sum(wire.values()), "wire": dict(wire)}
    for what, taken in (("kept", measured.kept.get(name)), ("peak", measured.peak.get(name))):
        row[f"{what}_bytes"] = None if taken is None else asdict(taken)
    return row


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
