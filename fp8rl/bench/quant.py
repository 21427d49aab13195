"""`fp8rl bench quant`: the blockwise cast against others' and against copying, side by side.

    GB/s = (2 bytes read + bytes written) for each weight / seconds

A clone writes 2 bytes for each weight, a cast 1 (and a scale for each block), so to have a clone's
GB/s a cast must take three quarters of its time. The ratios to the goals are those of the first
shape; the table has all. Weights are Gaussian, sigma 0.02, bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8rl.bench import quant_ways as ways
from fp8rl.bench.result import BenchResult, Ratio, device_name
from fp8rl.bench.timing import take_turns, temporary_bytes
from fp8rl.quant.reference import reference_cast

SQUARE: dict[str, tuple[int, ...]] = {"Qwen3-8B q_proj, o_proj": (4096, 4096)}
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3-8b": {
        "Qwen3-8B k_proj, v_proj": (1024, 4096),
        "Qwen3-8B gate_proj, up_proj": (12288, 4096),
        "Qwen3-8B down_proj": (4096, 12288),
    },
    "qwen3-30b-a3b": {
        "Qwen3-30B-A3B q_proj": (4096, 2048),
        "Qwen3-30B-A3B k_proj, v_proj": (512, 2048),
        "Qwen3-30B-A3B o_proj": (2048, 4096),
        "Qwen3-30B-A3B expert gate_proj, up_proj": (768, 2048),
        "Qwen3-30B-A3B expert down_proj": (2048, 768),
        "Qwen3-30B-A3B 128 experts' down_proj": (128, 2048, 768),
    },
}


@dataclass(frozen=True)
class Goal:
    """A ratio to be reported: ours against another way, by time or by GB/s."""

    name: str
    ours: str
    other: str
    by_bandwidth: bool
    goal: float | None


def goals(device: torch.device) -> list[Goal]:
    """Return what is compared on this device, and what we are out for."""
    if device.type == "cuda":
        copies = [Goal("GB/s against copy_", ways.INTO, ways.COPY, True, 0.85)]
    else:
        copies = [
            Goal("GB/s against torch.clone", ways.OURS, ways.CLONE, True, 0.30),
            Goal("GB/s against copy_, both into a buffer", ways.INTO, ways.COPY, True, None),
        ]
    return [
        *copies,
        Goal("speed against vLLM", ways.OURS, ways.VLLM, False, 8.0),
        Goal("speed against transformers", ways.OURS, ways.HUGGING_FACE, False, 8.0),
        Goal("speed against torchao, compiled", ways.OURS, ways.TORCHAO, False, 1.0),
        Goal("speed against our path without a compiler", ways.OURS, ways.CHUNKED, False, None),
    ]


def shapes_of(models: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes to measure by name: the square one first, then the models' layers."""
    found = dict(SQUARE)
    for model in models:
        found |= MODELS[model]
    return found


def bench_quant(
    shapes: Mapping[str, tuple[int, ...]],
    rounds: int,
    device: torch.device,
    started: Callable[[str], None] = lambda _: None,
    done: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Measure every way on every shape; `started` hears each shape, `done` each round."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    available = [way for way in ways.ways() if way.available]
    missing = {way.name: way.package for way in ways.ways() if not way.available}
    for index, (name, shape) in enumerate(shapes.items()):
        started(name)
        generator = torch.Generator().manual_seed(index)
        weight = (torch.randn(shape, generator=generator) * 0.02).to(device, torch.bfloat16)
        with ways.quiet():
            calls = {way.name: way.prepare(weight) for way in available}
        seconds = take_turns(calls, rounds, device, done)
        moved = {way.name: _moved(weight, way) for way in available}
        for way in available:
            row = {"shape": name, "size": list(shape), "way": way.name, "calls": way.function}
            rows.append(row | _figures(seconds[way.name], moved[way.name]))
            rows[-1] |= _quality(calls[way.name], way, weight, device)
        if index == 0:
            ratios = _ratios(seconds, moved, device)
    settings = {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "dtype": "bf16",
        "ratios_are_of": next(iter(shapes)),
        "not_installed": missing,
    }
    return BenchResult("quant", settings, ratios, rows, device_name(device))


def _moved(weight: Tensor, way: ways.Way) -> int:
    """Bytes that a perfect implementation reads and writes."""
    if way.scale_format is None:
        return 2 * weight.nbytes
    blocks = math.prod(math.ceil(size / 128) for size in weight.shape[-2:])
    return weight.nbytes + weight.numel() + 4 * blocks * math.prod(weight.shape[:-2])


def _figures(seconds: list[float], moved: int) -> dict[str, Any]:
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "milliseconds": {
            "median": 1e3 * median,
            "min": 1e3 * min(seconds),
            "max": 1e3 * max(seconds),
        },
        "gigabytes_per_second": moved / median / 1e9,
    }


def _quality(
    call: Callable[[], Any], way: ways.Way, weight: Tensor, device: torch.device
) -> dict[str, Any]:
    """What else tells the ways apart: memory taken, and whether the bytes are the reference's."""
    taken = temporary_bytes(call, device)
    found: dict[str, Any] = {"peak_bytes_per_weight": taken and taken / weight.numel()}
    if way.scale_format is not None:
        data, scale_inv = call()
        expected, expected_scale = reference_cast(weight, (128, 128), way.scale_format)
        same = data.view(torch.uint8) == expected.view(torch.uint8)
        found["codes_equal"] = float(same.float().mean())
        found["scales_equal"] = float((scale_inv.float() == expected_scale).float().mean())
    return found


def _ratios(
    seconds: Mapping[str, list[float]], moved: Mapping[str, int], device: torch.device
) -> dict[str, Ratio]:
    found = {}
    for goal in goals(device):
        if goal.ours in seconds and goal.other in seconds:
            factor = moved[goal.ours] / moved[goal.other] if goal.by_bandwidth else 1.0
            others = [factor * s for s in seconds[goal.other]]
            found[goal.name] = Ratio.of(others, seconds[goal.ours], goal.goal)
    return found
