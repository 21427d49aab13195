"""The command line of ``fp8rl stability``; command.py does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8rl.lifeline import ends_at_once

STABILITY_EXAMPLES = """
Examples:

- `fp8rl stability examples/stability.yaml`: all arms, five seeds each

- `fp8rl stability examples/stability.yaml --arms bf16,fp8,fp8-tis --seeds 2 run.steps=20`: a part
  of it, shorter

- `fp8rl stability examples/stability.yaml --out runs/stability`: where one was stopped or killed,
  the same command goes on

- `fp8rl stability examples/stability.yaml --bench runs/bench-rollout-20260101-120000`: with the
  throughput that `fp8rl bench rollout` measured among the claims
"""


def stability(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="YAML file of the study, such as examples/stability.yaml."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Values that replace those of the file, such as run.steps=20 or margin=0.05.",
            show_default=False,
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Run these arms alone; all unless given. What ended in the folder before is shown "
            "beside them.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each arm; the file's unless given.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the study.")] = Path(
        "runs/stability"
    ),
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time, each on its share of the cores; one a core, as far as the memory "
            "goes (3 GiB each), unless given.",
            show_default=False,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Result of `fp8rl bench rollout`, for the claims about throughput.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Is FP8 safe to train with? Run arms x seeds of the real loop; judge each arm by its baseline.

    Runs of one seed begin with the same weights and see the same prompts, so that arms are compared
    in pairs. The folder holds result.json, report.html, stability.png, claims.md, and a run folder
    for each arm and seed. The last line printed is that folder. After Ctrl-C or a kill the same
    command goes on. Exit codes: 0 done; 1 runs are missing; 2 nothing was started, and one message
    says why; 130 stopped by Ctrl-C.
    """
    with ends_at_once():
        from fp8rl.stability.command import run
    named = None if arms is None else [name.strip() for name in arms.split(",")]
    raise typer.Exit(
        run(
            config,
            overrides or [],
            arms=named,
            seeds=seeds,
            out=out,
            jobs=jobs,
            bench=bench,
            as_json=as_json,
        )
    )
