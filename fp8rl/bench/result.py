"""What every benchmark leaves: a folder with result.json, and a table.

ratios   name -> median, min, max over the rounds, and the goal; more is better
rows     the absolute figures, one record for each thing measured
command, device, environment, settings   where they come from
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp8rl.environment import cpu_model, environment
from fp8rl.run_dir import write_file


@dataclass(frozen=True)
class Ratio:
    """A ratio of two things measured in the same rounds, named so that more is better."""

    median: float
    min: float
    max: float
    goal: float | None

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float], goal: float | None) -> Ratio:
        """Take `above / below` round by round."""
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios), goal)


@dataclass(frozen=True)
class BenchResult:
    """One benchmark's figures."""

    bench: str
    settings: dict[str, Any]
    ratios: dict[str, Ratio]
    rows: list[dict[str, Any]]
    device: str
    command: str = field(default_factory=lambda: shlex.join(["fp8rl", *sys.argv[1:]]))
    environment: dict[str, Any] = field(default_factory=environment)

    def write(self, folder: Path) -> None:
        """Write result.json into `folder`."""
        write_file(folder / "result.json", json.dumps(asdict(self), indent=1).encode())


def device_name(device: torch.device) -> str:
    """Return the processor's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
