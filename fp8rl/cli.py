"""The ``fp8rl`` command: train, quantize, stability, bench, report, doctor.

Importing this file loads neither torch nor vLLM: ``fp8rl --help`` answers at once, and each command
imports what it needs. Exit codes: 0 done; 1 the run failed; 2 the command line, the config, the run
folder or the machine does not allow it (said in one message, before anything heavy starts); 130
stopped by Ctrl-C, with the run saved.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fp8rl.bench.command import app as bench_app
from fp8rl.lifeline import STOPPED, ends_at_once
from fp8rl.quantize_cli import QUANTIZE_EXAMPLES, quantize
from fp8rl.stability.cli import STABILITY_EXAMPLES, stability

if TYPE_CHECKING:
    from fp8rl.config.run import RunConfig
    from fp8rl.doctor.machine import Finding

app = typer.Typer(
    help="FP8 rollouts for reinforcement learning on language models: quantized weight sync, a "
    "calibrated FP8 KV cache, and a corrected loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN_EXAMPLES = """
Examples:

- `fp8rl train examples/grpo.yaml`: FP8 weights and FP8 KV cache in the rollout engine

- `fp8rl train examples/grpo.yaml --precision bf16 run_dir=runs/bf16`: the arm to compare with

- `fp8rl train examples/grpo.yaml steps=20 correction.preset=decoupled_token_icepop`: change
  single values

- `fp8rl train examples/grpo.yaml trainer.precision=fp8-aligned`: the trainer computes with the
  FP8 weights that the engine holds

- `fp8rl train examples/grpo.yaml drift.every=10 drift.answer=fall-back`: where engine and trainer
  drift apart, the cache or the weights go on in BF16

- `fp8rl train --resume runs/demo`: go on where a run was stopped or killed
"""

REPORT_EXAMPLES = """
Examples:

- `fp8rl report runs/demo`: one run, also while it goes on

- `fp8rl report runs/fp8-* runs/bf16-* --out fp8.html`: arms and their seeds side by side

- `fp8rl report runs/stability/runs/fp8/seed-* runs/stability/runs/bf16/seed-*`: two arms of a study
"""

DOCTOR_EXAMPLES = """
Examples:

- `fp8rl doctor`: this machine, with a tiny real engine (some 20 seconds)

- `fp8rl doctor --no-engine --json`: at once, for a program

- `fp8rl doctor runs/demo`: the KV-cache scales of a run, and what they clip
"""


def main() -> None:
    """Entry point of the ``fp8rl`` command."""
    try:
        app()
    finally:  # the exit code is decided: one more Ctrl-C must not replace it by the signal's
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file that describes the run, such as examples/grpo.yaml. "
            "Left out with --resume.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values that replace those of the file, such as steps=20 or loss.preset=grpo.",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp8", "kv-only", "fp8-kv"] | None,
        typer.Option(
            help="Arm of the rollout engine: bf16; fp8 (blockwise FP8 weights); kv-only (FP8 KV "
            "cache); fp8-kv (both). The config's rollout.precision unless given.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Continue the run in this folder from its last checkpoint, with the "
            "config.yaml in it.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Run RL with FP8 rollouts; the last line printed is the run's folder.

    The folder holds config.yaml, metrics.jsonl, report.html, curves.png and result.json.
    Exit codes: 0 done; 1 the run failed; 2 nothing was started, and one message says why; 130
    stopped by Ctrl-C, with the run saved.
    """
    with _exit_codes(), ends_at_once():
        run = _run_config(config, overrides or [], precision, resume)
        _check(run, fresh=resume is None and "RANK" not in os.environ)
    arguments = _train_arguments(config, overrides or [], precision, resume, as_json)
    if run.world_size > 1 and "RANK" not in os.environ:
        from fp8rl.launch import launch

        raise typer.Exit(launch(arguments, run.world_size))
    with _exit_codes(run.run_dir):
        with ends_at_once():
            from fp8rl.loop import train as train_loop
        folder = train_loop(run, resume is not None, shlex.join(["fp8rl", *arguments]))
    if os.environ.get("RANK", "0") == "0":
        _print_result(folder, as_json)


app.command(epilog=QUANTIZE_EXAMPLES)(quantize)
app.command(epilog=STABILITY_EXAMPLES)(stability)
app.add_typer(bench_app, name="bench")


@app.command(epilog=REPORT_EXAMPLES)
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Folders that `fp8rl train` wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Where the page goes: RUN_DIR/report.html of one run, comparison.html in this "
            "folder of several, unless given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page that says whether FP8 is safe for a run, and what it bought.

    Of one run: report.html and curves.png in its folder. Of several: one page with all of them side
    by side; runs that differ in their seed alone (and where it began) are one arm, and the first
    BF16 arm is what the others are held against. Works for runs that go on or were killed, too. The
    page needs no network; the last line printed is its path.
    """
    with _exit_codes():
        from fp8rl.report.summary import write_comparison, write_report

        if len(run_dirs) == 1:
            written = write_report(run_dirs[0], out)
        else:
            written = write_comparison(run_dirs, out or Path("comparison.html"))
        typer.echo(str(written))


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(
    run_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_DIR",
            help="Folder of a run whose KV-cache scales to look at, also while it runs. Left out, "
            "the machine is examined.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine/--no-engine",
            help="Start a tiny real engine, look whether our vLLM plugin is live in its workers "
            "(vLLM is silent about a plugin that fails to load), and whether it takes KV scales. "
            "Never with RUN_DIR.",
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as one JSON object instead.")
    ] = False,
) -> None:
    """Examine this machine, or the KV-cache scales of a run.

    Says what the machine has, what is missing, and what each missing thing costs; exit code 1 if
    something is missing that the default arm (fp8-kv) needs. With RUN_DIR: scale, saturation and
    underflow of each layer's q, k and v in the run's last step; exit code 1 if a saturation passes
    the run's kv_scales.warn_saturation, and 2 if no run is there.
    """
    if run_dir is not None:
        raise typer.Exit(_examine_run(run_dir, as_json))
    from rich.console import Console

    from fp8rl.doctor.engine import examine_engine
    from fp8rl.doctor.machine import examine

    findings = examine()
    if engine:
        with Console(stderr=True).status("starting a tiny engine, some 20 seconds"):
            findings += examine_engine()
    good = all(finding.state != "missing" for finding in findings)
    if as_json:
        rows = [vars(finding) for finding in findings]
        typer.echo(json.dumps({"ok": good, "findings": rows}))
    else:
        _print_findings(findings, good)
    raise typer.Exit(0 if good else 1)


def _run_config(
    config: Path | None, overrides: Sequence[str], precision: str | None, resume: Path | None
) -> RunConfig:
    from fp8rl.config.file import load_config
    from fp8rl.errors import ConfigError
    from fp8rl.run_dir import RunDir

    if resume is None:
        if config is None:
            raise ConfigError("give a CONFIG file, such as examples/grpo.yaml, or --resume RUN_DIR")
        chosen = [] if precision is None else [f"rollout.precision={precision}"]
        return load_config(config, [*overrides, *chosen])
    if config is not None or overrides or precision is not None:
        raise ConfigError(
            "--resume goes on with the run's own config.yaml: leave out CONFIG, KEY=VALUE and "
            "--precision"
        )
    folder = RunDir.open(resume)
    return load_config(folder.config).model_copy(update={"run_dir": resume})


def _check(run: RunConfig, *, fresh: bool) -> None:
    """Refuse what cannot work, before any process starts."""
    from fp8rl.doctor.machine import check_machine
    from fp8rl.errors import RunDirError
    from fp8rl.run_dir import RunDir
    from fp8rl.task import DigitTask

    if fresh and RunDir(run.run_dir).config.exists():
        raise RunDirError(
            f"{run.run_dir}: holds a run already; continue it with --resume {run.run_dir}, or "
            "choose another run_dir=FOLDER"
        )
    DigitTask(run.task, run.seed)
    check_machine(run)


def _train_arguments(
    config: Path | None,
    overrides: Sequence[str],
    precision: str | None,
    resume: Path | None,
    as_json: bool,
) -> list[str]:
    """The command line that says the same again."""
    arguments = ["train", *([str(config)] if config else []), *overrides]
    arguments += ["--precision", precision] if precision else []
    arguments += ["--resume", str(resume)] if resume else []
    return arguments + (["--json"] if as_json else [])


def _print_result(folder: Path, as_json: bool) -> None:
    from fp8rl.run_dir import RunDir

    typer.echo(json.dumps(RunDir.open(folder).read_result()) if as_json else str(folder))


def _examine_run(run_dir: Path, as_json: bool) -> int:
    """Show the KV scales of a run; returns the exit code."""
    with _exit_codes():
        from rich.console import Console

        from fp8rl.doctor.kv_health import health_table, kv_health

        health = kv_health(run_dir)
    if as_json:
        typer.echo(json.dumps(health.to_json()))
    else:
        Console().print(health_table(health))
    return 0 if health.warning is None else 1


def _print_findings(findings: Sequence[Finding], good: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("ok", "green"), "missing": ("MISSING", "red"), "optional": ("-", "yellow")}
    table = Table()
    for heading in ("", "", "found", "what its absence costs"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(*marks[finding.state]), Text(finding.name), Text(finding.found), Text(finding.cost)
        )
    console = Console()
    console.print(table)
    console.print(
        "The default arm (fp8-kv) runs here."
        if good
        else "The default arm (fp8-kv) does not run here: see what is MISSING."
    )


@contextmanager
def _exit_codes(run_dir: Path | None = None) -> Iterator[None]:
    """Turn our own errors into one message and an exit code; others keep their traceback."""
    from fp8rl.errors import ConfigError, RunDirError

    try:
        yield
    except (ConfigError, RunDirError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        begun = run_dir is not None and run_dir.exists()
        again = f"; go on with: fp8rl train --resume {run_dir}" if begun else ""
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"{STOPPED}{again}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("fp8rl."):
            raise
        typer.echo(f"fp8rl: {error}", err=True)
        if run_dir:
            typer.echo(f"fp8rl: run folder {run_dir}, engine log {run_dir}/engine.log", err=True)
        raise typer.Exit(1) from error
