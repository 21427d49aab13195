"""The runs of a study: their configurations, their folders, and how far each has come.

    OUT/starts/<digest>-<seed>/            the end of a warm-up that several runs begin with
    OUT/runs/<arm>/seed-<n>/               a run, as ``fp8rl train`` writes it, and train.log
    OUT/runs/<arm>/seed-<n>/failed.json    why it did not reach its end

Runs of one seed with one model, task and warm-up share the start, so that their differences are
those of the arms. Its digest is of these; the other settings of a warm-up (bound on the gradient,
micro-batches) are those of the shared run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import yaml

from fp8rl.config.file import load_config, parse_config
from fp8rl.config.run import RunConfig
from fp8rl.errors import RunDirError
from fp8rl.run_dir import RunDir, write_file
from fp8rl.stability.config import StudyConfig
from fp8rl.warm_up import start_facts

State = Literal["new", "begun", "ended", "failed"]
DONE: tuple[State, ...] = ("ended", "failed")


@dataclass(frozen=True)
class Failure:
    """Why a run did not reach its end.

    numerical: its numbers broke (a gradient that is not finite, say), which is what a study is to
    find out; else the machine's fault, and the run is tried again.
    """

    error: str
    message: str
    step: int
    numerical: bool


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed: its configuration, and how its start is made."""

    arm: str
    seed: int
    config: RunConfig
    start_config: RunConfig

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> RunDir:
        """Where it writes."""
        return RunDir(self.config.run_dir)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.config.run_dir / "train.log"

    @property
    def start(self) -> Path:
        """Where it begins."""
        start = self.config.warmup.start_from
        assert start is not None  # set by ``planned``
        return start

    @property
    def engine_key(self) -> str:
        """Runs with the same key want the same engine."""
        wanted = self.config.model_dump(mode="json", include={"model", "task", "rollout"})
        return json.dumps(wanted, sort_keys=True)

    @property
    def state(self) -> State:
        """How far it has come; a run that the machine failed has begun, and is gone on with."""
        if self.folder.result.is_file():
            return "ended"
        failure = self.failure()
        if failure is not None and failure.numerical:
            return "failed"
        return "begun" if self.folder.config.is_file() else "new"

    def failure(self) -> Failure | None:
        """Why it failed last; None where it did not."""
        path = self.config.run_dir / "failed.json"
        return Failure(**json.loads(path.read_text())) if path.is_file() else None

    def fail(self, failure: Failure | None) -> None:
        """Keep why it failed; None: it did not, after all."""
        path = self.config.run_dir / "failed.json"
        if failure is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(asdict(failure), indent=2).encode() + b"\n")

    def tidy(self) -> None:
        """Drop the checkpoints of a run that has ended: nobody goes on with it."""
        if self.state == "ended" and self.folder.checkpoints.exists():
            shutil.rmtree(self.folder.checkpoints)

    def check(self) -> None:
        """Refuse a folder that holds a run of another configuration.

        Raises:
            RunDirError: it does; the message names the keys that differ.
        """
        if not self.folder.config.is_file():
            return
        held = _flat(load_config(self.folder.config))
        odd = [
            f"{key} is {held.get(key)!r} there, {value!r} here"
            for key, value in _flat(self.config).items()
            if held.get(key) != value
        ]
        if odd:
            raise RunDirError(
                f"{self.config.run_dir}: holds a run of another configuration "
                f"({'; '.join(odd)}); take another --out, or delete that folder"
            )


@dataclass(frozen=True)
class Plan:
    """A study in its folder."""

    study: StudyConfig
    out: Path
    runs: tuple[StudyRun, ...]

    @classmethod
    def of(cls, study: StudyConfig, out: Path, arms: Iterable[str] | None = None) -> Self:
        """Plan every seed of ``arms``, or of all; seed by seed, so that pairs end early."""
        chosen = [name for name in study.arms if arms is None or name in set(arms)]
        runs = [_planned(study, out, arm, s) for s in range(study.seeds) for arm in chosen]
        return cls(study, out, tuple(runs))

    @property
    def arms(self) -> list[str]:
        """The arms planned, in the study's order."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of_arm(self, arm: str) -> list[StudyRun]:
        """The runs of an arm, by seed."""
        return [run for run in self.runs if run.arm == arm]


def _planned(study: StudyConfig, out: Path, arm: str, seed: int) -> StudyRun:
    config = study.run_config(arm).model_copy(update={"seed": seed})
    shared = parse_config(study.run).model_copy(
        update={x: getattr(config, x) for x in ("seed", "model", "task", "warmup")}
    )
    facts = json.dumps(start_facts(config) | {"seed": None}, sort_keys=True)
    start = out / "starts" / f"{hashlib.sha256(facts.encode()).hexdigest()[:8]}-{seed}"
    update = {
        "run_dir": out / "runs" / arm / f"seed-{seed}",
        "warmup": config.warmup.model_copy(update={"start_from": start}),
    }
    return StudyRun(arm, seed, config.model_copy(update=update), shared)


def _flat(config: RunConfig) -> dict[str, object]:
    """Dotted keys and values, without folders, which may have been moved."""
    flat: dict[str, object] = {}

    def add(prefix: str, section: dict[str, object]) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value

    add("", yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    return {key: v for key, v in flat.items() if key not in ("run_dir", "warmup.start_from")}
