"""`fp8rl bench correction`, as the command line has it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8rl.bench.folders import make

CORRECTION_EXAMPLES = """
Examples:

- `fp8rl bench correction`: a million tokens, half a minute on two cores

- `.venv-verl/bin/fp8rl bench correction`: beside veRL's own, from the environment that
  `make setup-verl` makes

- `fp8rl bench correction --device cuda`: on a GPU
"""


def correction(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json and correction.png go; runs/bench-correction-DATE-TIME unless "
            "given.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Responses in the batch.")] = 256,
    columns: Annotated[int, typer.Option(min=4, help="Tokens of the longest response.")] = 4096,
    vocabulary: Annotated[
        int, typer.Option(min=2, help="Words of the vocabulary, for the log-probs.")
    ] = 32768,
    rounds: Annotated[
        int, typer.Option(min=3, help="Turns of each way; ratios are taken within a round.")
    ] = 9,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where the tensors are; cuda needs a GPU.")
    ] = "cpu",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Time importance correction, loss and log-probs against veRL's and plain torch's.

    All ways take turns on the same tensors in one process; veRL's where it is installed. The last
    line printed is the folder with result.json and correction.png.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fp8rl.bench.correction import bench_correction
    from fp8rl.bench.correction_report import print_result, save_picture

    if device == "cuda" and not torch.cuda.is_available():
        typer.echo(
            "fp8rl: --device cuda, but torch finds no CUDA device; use --device cpu", err=True
        )
        raise typer.Exit(2)
    folder = out or Path("runs") / f"bench-correction-{datetime.now():%Y%m%d-%H%M%S}"
    make(folder)
    columns_shown = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns_shown, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=4 * rounds)
        result = bench_correction(
            rows,
            columns,
            vocabulary,
            rounds,
            torch.device(device),
            started=lambda name: progress.update(task, description=name),
            done=lambda: progress.advance(task),
        )
    result.write(folder)
    save_picture(result, folder / "correction.png")
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))
