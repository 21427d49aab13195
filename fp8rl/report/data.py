"""A run's folder as a report reads it: configuration, metrics, and what result.json adds.

Everything shown follows from config.yaml and metrics.jsonl, so that a run that goes on, was stopped
or was killed has a report too. Command and environment are known once the run has ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from fp8rl.errors import RunDirError
from fp8rl.run_dir import Metrics, RunDir

ARM_KEYS = ("rollout", "trainer", "task", "correction")  # sections that each report reads


@dataclass(frozen=True)
class FellBack:
    """That a run went on with less in FP8: from which step on, in what precision, and why."""

    step: int
    precision: str
    why: str


@dataclass(frozen=True)
class RunData:
    """One run. ``command`` and ``environment`` are None where the run has not ended."""

    path: Path
    config: Mapping[str, Any]
    metrics: Sequence[Metrics]
    command: str | None = None
    environment: Mapping[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the folder ``path``.

        Raises:
            RunDirError: no run is there, or its config, metrics or result.json are broken.
        """
        if _holds_a_study(path):
            raise RunDirError(
                f"{path}: holds a study of `fp8rl stability`, whose page is "
                f"{path / 'report.html'}; to compare runs of it: fp8rl report "
                f"{path / 'runs' / 'ARM' / 'seed-*'} {path / 'runs' / 'OTHER_ARM' / 'seed-*'}"
            )
        run = RunDir.open(path)
        config, stored = run.read_config(), run.read_result() or {}
        missing = [key for key in ARM_KEYS if not isinstance(config.get(key), dict)]
        if missing:
            raise RunDirError(
                f"{run.config}: has no section {', '.join(missing)}; a report needs those of "
                "`fp8rl train`"
            )
        return cls(path, config, run.metrics(), stored.get("command"), stored.get("environment"))

    @property
    def steps(self) -> int:
        """The last step that ended; 0 before the first."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned(self) -> int:
        """The steps that the configuration asks for."""
        return int(self.config["steps"])

    @property
    def ended(self) -> bool:
        """Whether all planned steps are done."""
        return self.steps >= self.planned

    @property
    def precision(self) -> str:
        """``rollout.precision``: what the run began in."""
        return str(self.config["rollout"]["precision"])

    @property
    def fell_back(self) -> list[FellBack]:
        """Where the run fell back, in order: the step after the probe that asked for it."""
        return [
            FellBack(
                int(after["step"]), str(after["drift/precision"]), str(before["drift/fall_back"])
            )
            for before, after in pairwise(self.metrics)
            if "drift/fall_back" in before
        ]

    @property
    def last_precision(self) -> str:
        """What its last step was in."""
        fell_back = self.fell_back
        return fell_back[-1].precision if fell_back else self.precision

    def series(self, key: str) -> Series:
        """The finite values of a metric, with their steps."""
        pairs = [
            (int(line["step"]), float(line[key]))
            for line in self.metrics
            if key in line and math.isfinite(float(line[key]))
        ]
        return Series(key, tuple(step for step, _ in pairs), tuple(value for _, value in pairs))


def _holds_a_study(path: Path) -> bool:
    """Whether a folder has the runs of a study in it, and is none itself."""
    return not RunDir(path).metrics_file.exists() and any(path.glob("runs/*/seed-*/config.yaml"))


@dataclass(frozen=True)
class Series:
    """A metric over steps; statistics are None where it was never measured."""

    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        """How often it was measured."""
        return len(self.values)

    @property
    def first(self) -> float | None:
        """The first value."""
        return self.values[0] if self.values else None

    @property
    def last(self) -> float | None:
        """The last value."""
        return self.values[-1] if self.values else None

    @property
    def mean(self) -> float | None:
        """The mean over steps."""
        return fmean(self.values) if self.values else None

    @property
    def median(self) -> float | None:
        """The median over steps."""
        return median(self.values) if self.values else None

    @property
    def max(self) -> float | None:
        """The largest value."""
        return max(self.values, default=None)

    @property
    def total(self) -> float | None:
        """The sum over steps."""
        return sum(self.values) if self.values else None

    @property
    def recent(self) -> Series:
        """The last fifth of the values, five at least: how it is at the end."""
        kept = max(5, len(self) // 5)
        return Series(self.key, self.steps[-kept:], self.values[-kept:])

    @property
    def over(self) -> str:
        """The steps in words, as ``100 steps, 0 to 99``."""
        if not self.steps:
            return "no step"
        plural = "step" if len(self) == 1 else "steps"
        return f"{len(self)} {plural}, {self.steps[0]} to {self.steps[-1]}"
