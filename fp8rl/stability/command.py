"""What ``fp8rl stability`` does: plan, run what is left, judge, write, say what came of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console

from fp8rl.doctor.machine import check_machine
from fp8rl.environment import usable_cores
from fp8rl.errors import ConfigError, RunDirError, StudyError
from fp8rl.lifeline import STOPPED
from fp8rl.run_dir import RunDir
from fp8rl.stability.config import load_study
from fp8rl.stability.execute import Execution
from fp8rl.stability.page import write_page
from fp8rl.stability.picture import write_picture
from fp8rl.stability.plan import DONE, Plan
from fp8rl.stability.result import Result, claims_table, read_bench

BYTES_A_RUN = 3 * 2**30  # trainer and engine of a small model: 2, measured


def run(
    path: Path,
    overrides: Sequence[str],
    *,
    arms: Sequence[str] | None,
    seeds: int | None,
    out: Path,
    jobs: int | None,
    bench: Path | None,
    as_json: bool,
) -> int:
    """Do the study and report; return the exit code. See ``cli.stability`` for the arguments."""
    console, command = Console(stderr=True), shlex.join(["fp8rl", *sys.argv[1:]])
    try:
        plan = _plan(path, [*overrides, *([] if seeds is None else [f"seeds={seeds}"])], arms, out)
        measured = None if bench is None else read_bench(bench)
        out.mkdir(parents=True, exist_ok=True)
        with RunDir(out).locked():
            shown = _with_ended(plan)
            Execution(plan, command, console).run(jobs or _jobs())
            result = _result(shown, measured)
            written = result.write(command)
            write_picture(result)
            write_page(result, written)
    except (ConfigError, RunDirError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        return 2
    except StudyError as error:
        typer.echo(f"fp8rl: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        typer.echo(f"{STOPPED}; go on with the same command: {command}", err=True)
        return 130
    console.print(result.table())
    console.print(claims_table(result.claims))
    for name, why in result.unfinished.items():
        typer.echo(f"fp8rl: {name} is missing: {why}", err=True)
    if result.unfinished:
        typer.echo(f"fp8rl: go on with the same command: {command}", err=True)
    typer.echo(json.dumps(written) if as_json else str(out))
    return 1 if result.unfinished else 0


def _result(plan: Plan, measured: dict[str, Any] | None) -> Result:
    """What the runs' folders say; StudyError where one is broken."""
    try:
        return Result.of(plan, measured)
    except RunDirError as error:
        raise StudyError(str(error)) from error


def _jobs() -> int:
    """One run a core, as far as the memory goes."""
    fit = psutil.virtual_memory().available // BYTES_A_RUN
    return max(1, min(usable_cores(), fit))


def _with_ended(plan: Plan) -> Plan:
    """The plan, with the arms beside it whose runs have all ended in its folder before."""
    whole = Plan.of(plan.study, plan.out)
    ended = {a for a in whole.arms if all(r.state in DONE for r in whole.of_arm(a))}
    shown = Plan.of(plan.study, plan.out, ended.union(plan.arms))
    for run in shown.runs:
        run.check()
    return shown


def _plan(path: Path, overrides: list[str], arms: Sequence[str] | None, out: Path) -> Plan:
    """The plan, with everything refused that cannot work."""
    study = load_study(path, overrides)
    unknown = [name for name in arms or () if name not in study.arms]
    if unknown:
        raise ConfigError(
            f"--arms: {path} has no arm {', '.join(unknown)}; it has {', '.join(study.arms)}"
        )
    plan = Plan.of(study, out, arms)
    for config in {run.arm: run.config for run in plan.runs}.values():
        check_machine(config)
    for run in plan.runs:
        run.check()
    return plan
