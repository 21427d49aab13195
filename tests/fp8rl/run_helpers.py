"""A tiny run through the real command line, and ways to hurt it and to see what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

PATIENCE = 240.0  # seconds to wait for what takes ten on an idle machine
SURVIVAL = 10.0  # seconds that a process may outlive the command
STEPS = 16

TINY = {
    "seed": 3,
    "steps": STEPS,
    "eval_every": 5,
    "checkpoint_every": 3,
    "model": {"num_layers": 2},
    "task": {"min_digits": 1, "max_digits": 2, "heldout_prompts": 8},
    "warmup": {"steps": 45, "batch_size": 64, "learning_rate": 1e-3},  # reward above 0
    "trainer": {"learning_rate": 1e-3, "micro_batch_size": 32},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "kv_cache_gib": 0.02},
    "kv_scales": {"calibration_tokens": 128},
}

CLOCKED = (
    "time/",
    "sync/seconds",
    "sync/quantize_seconds",
    "sync/engine_seconds",
    "sync/kv_seconds",
    "rollout/tokens_per_second",
)


def write_config(folder: Path) -> Path:
    """The tiny run as a YAML file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@dataclass(frozen=True)
class End:
    """How a command ended, and what it left behind."""

    code: int
    seconds: float  # from the last signal
    output: str
    errors: str
    steps: list[int]  # in metrics.jsonl
    checkpoints: list[int]  # versions saved
    engines: int  # processes seen
    segments: int  # of weights, seen
    survivors: list[psutil.Process]
    litter: set[str]  # in /dev/shm, and processes that hold a segment


class Command:
    """One ``fp8rl train ...`` in its own process and session, as a terminal would start it."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self.folder = folder
        self.output = folder.with_suffix(f".{time.monotonic_ns()}.out")
        self.errors = self.output.with_suffix(".err")
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fp8rl", "train", *map(str, arguments)],
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
        self._metrics_before = _inode(folder / "metrics.jsonl")
        self._resumed_at = checkpoints(folder)[-1:]
        self._litter_before = shared_memory()
        self._struck = time.monotonic()
        self._family: set[psutil.Process] = set()
        self._engines: set[psutil.Process] = set()
        self._segments: set[int] = set()  # inodes of the weight segments that the family holds

    @property
    def pid(self) -> int:
        """Of the command's own process."""
        return self._process.pid

    def wait_until(self, what: str, true: Callable[[], object]) -> None:
        """Wait for something that happens while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self._process.poll() is None, f"ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"no {what}: {self.said()}"
            time.sleep(0.01)
        self._meet()

    def wait_for_a_step(self, after: int = 0) -> None:
        """Wait until this command has written the metrics of its first step, or of a later one."""
        step = (self._resumed_at or [0])[0] + after
        file = self.folder / "metrics.jsonl"  # a resumed run begins by replacing it
        self.wait_until(
            f"step {step}",
            lambda: _inode(file) != self._metrics_before and steps(self.folder)[-1:] >= [step],
        )

    def wait_for_a_standstill(self) -> None:
        """Wait until the command's own process computes nothing: it waits for another."""
        own = psutil.Process(self.pid)

        def idle() -> bool:
            before = sum(own.cpu_times()[:2])
            time.sleep(1.0)
            return sum(own.cpu_times()[:2]) - before < 0.1

        self.wait_until("standstill", idle)

    def wait_for_engine(self) -> None:
        """Wait until the engine's process is there (it is not yet up)."""
        self.wait_until("engine process", self.engines)

    def engines(self) -> list[psutil.Process]:
        """The engine processes that this command has started."""
        self._meet()
        return list(self._engines)

    def still_runs(self) -> bool:
        """Whether the command's own process has not ended."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command's process alone."""
        self._meet()
        self._struck = time.monotonic()
        self._process.send_signal(number)

    def ctrl_c(self) -> None:
        """What the terminal does: SIGINT to every process of the foreground group."""
        self._meet()
        self._struck = time.monotonic()
        os.killpg(self.pid, signal.SIGINT)

    def kill_engine(self) -> None:
        """SIGKILL to the engine's process."""
        self._struck = time.monotonic()
        for engine in self.engines():
            engine.kill()

    def end(self) -> End:
        """Wait for the end; whatever lives on ten seconds later is noted, and killed."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        seconds = time.monotonic() - self._struck
        waited_for = psutil.wait_procs(self._family, timeout=SURVIVAL)[1]
        survivors = [process for process in waited_for if runs(process)]
        litter = self._litter()
        deadline = time.monotonic() + SURVIVAL
        while litter and time.monotonic() < deadline:  # of other tests, which clean up after them
            time.sleep(0.2)
            litter &= self._litter()
        for process in survivors:
            process.kill()
        return End(
            code=code,
            seconds=seconds,
            output=self.output.read_text(),
            errors=self.errors.read_text(),
            steps=steps(self.folder),
            checkpoints=checkpoints(self.folder),
            engines=len(self._engines),
            segments=len(self._segments),
            survivors=survivors,
            litter=litter,
        )

    def said(self) -> str:
        """Standard output and standard error."""
        return self.output.read_text() + self.errors.read_text()

    def _litter(self) -> set[str]:
        return (shared_memory() - self._litter_before) | holders(self._segments)

    def _meet(self) -> None:
        """Take note of every process of the command, and of the segments that they hold."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.pid)
            self._family |= {own, *own.children(recursive=True)}
        for process in self._family:
            self._segments |= _segments(process.pid)
            if _is_engine(process):
                self._engines.add(process)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps(folder: Path) -> list[int]:
    """The steps in metrics.jsonl, in its order."""
    return [line["step"] for line in metrics(folder)]


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without those that a clock measured."""
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCKED)}
        for line in metrics(folder)
    ]


def checkpoints(folder: Path) -> list[int]:
    """Versions that are saved."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; a zombie has, and waits for its new parent to notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory() -> set[str]:
    """Files in /dev/shm that no living process has open or mapped, so that nobody will free."""
    files = {str(path) for path in Path("/dev/shm").iterdir()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text()
            files -= {name for name in files if name in maps}
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    files.discard(os.readlink(link))
    return files


def holders(segments: set[int]) -> set[str]:
    """Processes that hold any of these segments."""
    return {
        str(process)
        for process in Path("/proc").glob("[0-9]*")
        if _segments(int(process.name)) & segments
    }


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _segments(pid: int) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith("/memfd:fp8rl-weights"):
                    found.add(link.stat().st_ino)
    return found


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "fp8rl.engine.process" in process.cmdline()
    except psutil.Error:
        return False
