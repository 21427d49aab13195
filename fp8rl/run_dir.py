"""The folder that a run writes, and the only code that knows its layout.

    config.yaml     the whole configuration; its presence is what makes a folder a run
    metrics.jsonl   one flat JSON object a step, on disk before ``append`` returns
    checkpoints/    see ``checkpoint.py``
    engine.log      what the rollout engine printed
    curves.png, report.html, result.json   written at the end, see ``report/``

A run may be killed at any moment. A line of metrics counts once it is whole; a torn last line is
dropped. Every other file is written beside its place and renamed into it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from fp8rl.errors import RunDirError

Metrics = dict[str, float | int | str]
# JSON has no NaN and no infinity: they are written as these strings and read back as floats.
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass
class RunDir:
    """A run's folder. Make one with ``create`` (new run) or ``open`` (resume, report)."""

    path: Path
    _tail: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, path: Path, config_yaml: str) -> Self:
        """Start a run in ``path`` (made if missing).

        Raises:
            RunDirError: the folder holds a run already, or cannot be made.
        """
        run = cls(path)
        for held in (run.config, run.metrics_file, run.result, run.checkpoints):
            if held.exists():
                raise _holds_a_run(path, held.name)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_file(run.config, config_yaml.encode(), replace=False)
        except FileExistsError as error:  # a file in the way, or a run that started just now
            raise _holds_a_run(path, Path(error.filename or path).name) from error
        except OSError as error:
            raise RunDirError(f"{path}: the run folder cannot be made: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """A folder that holds a run already.

        Raises:
            RunDirError: no such folder, or no run in it.
        """
        run = cls(path)
        if not path.is_dir():
            raise RunDirError(f"{path}: no such run folder")
        if not run.config.is_file():
            raise RunDirError(f"{path}: not a run folder, it has no config.yaml")
        return run

    @property
    def config(self) -> Path:
        """The configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line; ``metrics()`` reads it."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        """The picture of the run."""
        return self.path / "curves.png"

    @property
    def drift(self) -> Path:
        """The picture of the drift watch."""
        return self.path / "drift.png"

    @property
    def result(self) -> Path:
        """The run's numbers, environment and command."""
        return self.path / "result.json"

    @property
    def engine_log(self) -> Path:
        """What the rollout engine printed."""
        return self.path / "engine.log"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes; the system lets go when this one ends.

        Raises:
            RunDirError: another process holds it; the message has its process id.
        """
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunDirError(
                    f"{self.path}: process {holder} is running in this folder; "
                    "wait for it, end it, or use another run_dir"
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def append(self, metrics: Mapping[str, float | int | str]) -> None:
        """Write one step's metrics as one line, on disk when this returns.

        Raises:
            RunDirError: no integer ``step``, or not a later one than the last line's.
        """
        step = metrics.get("step")
        if not isinstance(step, int):
            raise RunDirError(f"metrics need an integer 'step', found {step!r}")
        last_step, whole_bytes = self._tail or self._find_tail()
        if step <= last_step:
            raise RunDirError(
                f"{self.metrics_file}: has step {last_step} already, cannot append step {step}; "
                "truncate_metrics first"
            )
        line = _line(metrics)
        with self.metrics_file.open("ab") as file:
            file.truncate(whole_bytes)  # a torn line left by a kill
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._tail = step, whole_bytes + len(line)

    def read_config(self) -> dict[str, Any]:
        """config.yaml as it was written, unvalidated: that of an older version can be read too.

        Raises:
            RunDirError: it is not YAML, or not keys and values.
        """
        try:
            config = yaml.safe_load(self.config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunDirError(f"{self.config}: cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RunDirError(
                f"{self.config}: holds a {type(config).__name__}, expected keys and values"
            )
        return config

    def metrics(self) -> list[Metrics]:
        """All whole lines in order; empty before the first step.

        Raises:
            RunDirError: a line other than the last is broken; the message has its number.
        """
        return self._read()[0]

    def truncate_metrics(self, after_step: int) -> None:
        """Drop the lines of steps later than ``after_step``, atomically."""
        kept = [line for line in self.metrics() if int(line["step"]) <= after_step]
        write_file(self.metrics_file, b"".join(map(_line, kept)))
        self._tail = None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, atomically. Numbers must be finite (None where there is none)."""
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        write_file(self.result, text.encode())

    def read_result(self) -> dict[str, Any] | None:
        """What ``write_result`` wrote; None where the run has not ended.

        Raises:
            RunDirError: the file is there and is not a JSON object.
        """
        if not self.result.is_file():
            return None
        try:
            result = json.loads(self.result.read_bytes())
        except ValueError as error:
            raise RunDirError(f"{self.result}: is not JSON: {error}") from error
        if not isinstance(result, dict):
            raise RunDirError(f"{self.result}: holds a {type(result).__name__}, not an object")
        return result

    def _find_tail(self) -> tuple[int, int]:
        """The last step written (-1 before the first), and the bytes of all whole lines."""
        lines, whole_bytes = self._read()
        return (int(lines[-1]["step"]) if lines else -1), whole_bytes

    def _read(self) -> tuple[list[Metrics], int]:
        """The whole lines, and the bytes that they take at the start of the file."""
        if not self.metrics_file.exists():
            return [], 0
        lines: list[Metrics] = []
        whole_bytes = 0
        raw_lines = self.metrics_file.read_bytes().splitlines(keepends=True)
        for number, raw in enumerate(raw_lines, start=1):
            parsed = _parse(raw)
            if parsed is None:
                if number == len(raw_lines):
                    break
                raise RunDirError(
                    f"{self.metrics_file}: line {number} is broken (expected a JSON object with "
                    f"an integer 'step', found {raw[:80]!r}); mend or delete that line"
                )
            lines.append(parsed)
            whole_bytes += len(raw)
        return lines, whole_bytes


def write_file(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole.

    Raises:
        FileExistsError: ``replace`` is False and the file is there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if replace:
        partial.replace(path)
    else:
        try:
            os.link(partial, path)  # fails where the file exists, unlike a rename
        finally:
            partial.unlink()
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _holds_a_run(path: Path, held: str) -> RunDirError:
    return RunDirError(
        f"{path}: holds a run already ({held} is there); continue it with --resume {path}, or "
        "choose another run_dir"
    )


def _line(metrics: Mapping[str, float | int | str]) -> bytes:
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
    return json.dumps(plain, allow_nan=False).encode() + b"\n"


def _parse(raw: bytes) -> Metrics | None:
    """One line, or None where it is torn or is no line of metrics."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return {
        key: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in line.items()
    }
