"""A process that does the runs of a study in turn: ``python -m fp8rl.stability.lane FD``.

Jobs and replies are JSON lines over an inherited socket, one reply a job, in order:

    {"do": "start", "config", "folder", "log"}            -> {"end": "well"}
    {"do": "run", "config", "resume", "command", "log"}   -> {"end": "well"}
                                                          or {"end": "failed", "error", ...}

One process for many runs loads torch, Megatron and vLLM once. The engine is kept for the next run
that wants the same: it forgets the version that it holds, so that it serves nothing before the
first publish of that run has been proven. A run that fails takes its engine with it.

Ctrl-C is the parent's: it sends SIGINT, the run is saved after its step, and the lane ends. The
lane is killed when its parent dies (``lanes.py``), and its engine with it. An error that is not one
of ours ends the lane with a traceback in the run's log.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp8rl.config.file import parse_config
from fp8rl.lifeline import ends_at_once

with ends_at_once():
    from fp8rl.correction import LogProbError
    from fp8rl.engine.rollout import RolloutEngine
    from fp8rl.engine.settings import EngineSettings
    from fp8rl.errors import NonFiniteGradientError
    from fp8rl.loop import train
    from fp8rl.quant import NonFiniteError
    from fp8rl.quant.errors import NonFiniteKVError
    from fp8rl.warm_up import make_start

# A NaN or an Inf, where it was noticed: the run has broken. Other errors are to be mended.
NUMERICAL = (NonFiniteError, NonFiniteGradientError, NonFiniteKVError, LogProbError)
INTERRUPTED = 130


class EngineKeeper:
    """One engine, kept for the next run that wants the same."""

    def __init__(self) -> None:
        self._engine: RolloutEngine | None = None
        self._folder = Path()

    @contextmanager
    def open(self, settings: EngineSettings, folder: Path) -> Iterator[RolloutEngine]:
        """Give the engine kept, which holds no version, or a new one (``session.OpenEngine``)."""
        settings = replace(settings, seed=0)  # vLLM's own, which no request uses
        if self._engine is not None and self._engine.settings != settings:
            self.close()
        if self._engine is None:
            self._engine, self._folder = RolloutEngine(settings, folder), folder
        else:
            with (folder / "engine.log").open("a") as log:
                log.write(f"the engine of {self._folder} served this run; see its log\n")
        well = False
        try:
            yield self._engine
            self._engine.forget()
            well = True
        finally:
            if not well:
                self.close()

    def close(self) -> None:
        """Stop the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None


def do(job: dict[str, Any], engines: EngineKeeper) -> dict[str, Any]:
    """Do one job; returns the reply."""
    config = parse_config(job["config"], origin="job")
    try:
        if job["do"] == "start":
            make_start(config, Path(job["folder"]))
        else:
            opened = engines.open
            train(config, job["resume"], job["command"], open_engine=opened, draws=False)
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("fp8rl."):
            raise
        return {
            "end": "failed",
            "error": type(error).__name__,
            "message": str(error),
            "numerical": isinstance(error, NUMERICAL),
        }
    return {"end": "well"}


def main() -> None:
    """Serve; the argument is the socket's file descriptor."""
    connection, engines = socket.socket(fileno=int(sys.argv[1])), EngineKeeper()
    try:
        for line in connection.makefile("r", encoding="utf-8"):
            job = json.loads(line)
            _print_to(Path(job["log"]))
            connection.sendall(json.dumps(do(job, engines)).encode() + b"\n")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        engines.close()


def _print_to(log: Path) -> None:
    """Send what this process prints to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


if __name__ == "__main__":
    main()
