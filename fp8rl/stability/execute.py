"""Do what is left of a study, several runs at a time, and show how far it is.

Starts come first, then runs: where there is a choice, one that wants the engine that the lane has.
A run whose numbers break has failed, and the study goes on; one that the machine failed (the engine
died, a disk was full) is tried again by the next call of the same command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TimeElapsedColumn as Elapsed

from fp8rl import checkpoint
from fp8rl.errors import StudyError
from fp8rl.report.words import show
from fp8rl.run_dir import Metrics
from fp8rl.stability.lanes import Lane, Lanes
from fp8rl.stability.plan import DONE, Failure, Plan, StudyRun

POLL_SECONDS = 1.0
ETA_SECONDS = 300.0  # whose mean pace gives the time left
LOG_LINES_SHOWN = 15
REWARDS = ("reward/train", "reward/heldout")  # shown while a run goes on


@dataclass
class Job:
    """What a lane does: a run, or the making of its start."""

    run: StudyRun
    makes_start: bool
    command: str
    shown: TaskID = field(default=TaskID(0))

    @property
    def log(self) -> Path:
        """What it prints."""
        run = self.run
        return run.start.with_suffix(".log") if self.makes_start else run.log

    def message(self) -> dict[str, Any]:
        """The lane's order."""
        config = self.run.start_config if self.makes_start else self.run.config
        common = {"config": config.model_dump(mode="json"), "log": str(self.log)}
        if self.makes_start:
            return common | {"do": "start", "folder": str(self.run.start)}
        return common | {
            "do": "run",
            "resume": self.run.state == "begun",
            "command": self.command,
        }


class Execution:
    """The runs of a plan that are left, and the lanes that do them."""

    def __init__(self, plan: Plan, command: str, console: Console) -> None:
        self._left = [run for run in plan.runs if run.state not in DONE]
        for run in plan.runs:
            run.tidy()  # what a kill left
        self._plan, self._command, self._console = plan, command, console
        self._engines: dict[int, str] = {}  # lane -> the engine it has
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            Elapsed(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=ETA_SECONDS,
        )

    def run(self, count: int) -> None:
        """Do all that is left, ``count`` runs at a time.

        Raises:
            StudyError: a start could not be made. KeyboardInterrupt: Ctrl-C; runs are saved.
        """
        if not self._left:
            return
        total = sum(run.config.steps for run in self._plan.runs)
        done = total - sum(run.config.steps - _step(run) for run in self._left)
        lanes = Lanes[Job](count, min(count, len(self._left)), self._plan.out)
        with lanes, self._bar:
            self._all = self._bar.add_task("all runs", total=total, completed=done, note="")
            while self._left or any(lane.job for lane in lanes.lanes):
                for lane in lanes.lanes:
                    if lane.job is None and (job := self._next(lane, lanes.lanes)):
                        self._begin(lane, job)
                for lane, reply in lanes.wait(POLL_SECONDS):
                    self._end(lane, reply)
                self._show(lanes.lanes)

    def _next(self, lane: Lane[Job], lanes: Sequence[Lane[Job]]) -> Job | None:
        """What this lane does next; None: nothing, before another lane has made a start."""
        made = {x.job.run.start for x in lanes if x.job is not None and x.job.makes_start}
        ready: list[StudyRun] = []
        for run in self._left:
            if checkpoint.latest(run.start) is not None:
                ready.append(run)
            elif run.start not in made:
                return Job(run, True, self._command)
        same = [run for run in ready if run.engine_key == self._engines.get(id(lane))]
        if not ready:
            return None
        run = (same or ready)[0]
        self._left.remove(run)
        return Job(run, False, self._command)

    def _begin(self, lane: Lane[Job], job: Job) -> None:
        run = job.run
        what = f"start of {run.name}" if job.makes_start else run.name
        steps = run.config.warmup.steps if job.makes_start else run.config.steps
        note = "warm-up" if job.makes_start else ""
        job.shown = self._bar.add_task(f"  {what}", total=steps, note=note)
        if not job.makes_start:
            self._engines[id(lane)] = run.engine_key
        lane.send(job, job.message())

    def _end(self, lane: Lane[Job], reply: dict[str, Any]) -> None:
        job, lane.job = lane.job, None
        assert job is not None  # only lanes with a job are waited for
        self._bar.remove_task(job.shown)
        run = job.run
        if reply["end"] == "well":
            if not job.makes_start:
                run.fail(None)
                run.tidy()
                self._say(f"{run.name}: {_note(run.folder.metrics())}")
            return
        self._engines.pop(id(lane), None)
        if reply["end"] == "died":
            tail = job.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            error, numerical = f"exit code {reply['code']}", False
            message = "its process died; the last lines of its log:\n  " + "\n  ".join(tail)
        else:
            error, numerical = reply["error"], bool(reply["numerical"])
            message = reply["message"]
        if job.makes_start:
            raise StudyError(f"the start of {run.name} was not made: {error}: {message}")
        run.fail(Failure(error, message, _step(run), numerical))
        verdict = "failed" if numerical else "NOT DONE, will be tried again"
        self._say(f"{run.name}: {verdict} at step {_step(run)}: {error}: {message}")

    def _show(self, lanes: Sequence[Lane[Job]]) -> None:
        """Bring the bars up to date."""
        running = [lane.job for lane in lanes if lane.job is not None]
        for job in running:
            if not job.makes_start:
                note = _note(job.run.folder.metrics())
                self._bar.update(job.shown, completed=_step(job.run), note=note)
        left = [*self._left, *(job.run for job in running if not job.makes_start)]
        total = sum(run.config.steps for run in self._plan.runs)
        done = total - sum(run.config.steps - _step(run) for run in left)
        ended = len(self._plan.runs) - len(left)
        self._bar.update(self._all, completed=done, note=f"{ended}/{len(self._plan.runs)} runs")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _step(run: StudyRun) -> int:
    """The last step that it has done."""
    lines = run.folder.metrics()
    return int(lines[-1]["step"]) if lines else 0


def _note(lines: Sequence[Metrics]) -> str:
    """The last step and rewards, in a few words."""
    if not lines:
        return "waiting for its engine"
    last = {key: float(line[key]) for line in lines for key in REWARDS if key in line}
    train, heldout = (show(last.get(key), ".3f") for key in REWARDS)
    return f"step {lines[-1]['step']}, reward {train}, held-out {heldout}"
