"""The command line of the benchmarks: `fp8rl bench quant`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Measure fp8rl beside its alternatives, in one run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

QUANT_EXAMPLES = """
Examples:

- `fp8rl bench quant`: all shapes, some two minutes on two cores

- `fp8rl bench quant --model none --rounds 30`: the 4096 x 4096 weight alone, to check the ratios

- `fp8rl bench quant --device cuda`: the Triton kernel against the GPU's copy bandwidth
"""


@app.callback()
def benchmarks() -> None:
    """Measure fp8rl beside its alternatives, in one run."""


@app.command(epilog=QUANT_EXAMPLES)
def quant(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json and quant.png go; runs/bench-quant-DATE-TIME unless given.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Literal["all", "qwen3-8b", "qwen3-30b-a3b", "none"],
        typer.Option(help="Model whose layer shapes are measured after 4096 x 4096."),
    ] = "all",
    rounds: Annotated[
        int, typer.Option(min=3, help="Turns of each way; ratios are taken within a round.")
    ] = 9,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="What casts; cuda needs a GPU.")
    ] = "cpu",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Time the blockwise FP8 cast against copying, vLLM's, transformers' and torchao's.

    All ways take turns on the same weights in one process. The last line printed is the folder with
    result.json and quant.png.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fp8rl.bench.quant import MODELS, bench_quant, shapes_of
    from fp8rl.bench.quant_report import print_result, save_picture

    if device == "cuda" and not torch.cuda.is_available():
        typer.echo(
            "fp8rl: --device cuda, but torch finds no CUDA device; use --device cpu", err=True
        )
        raise typer.Exit(2)
    folder = out or Path("runs") / f"bench-quant-{datetime.now():%Y%m%d-%H%M%S}"
    _make(folder)
    shapes = shapes_of({"all": list(MODELS), "none": []}.get(model, [model]))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=rounds * len(shapes))
        result = bench_quant(
            shapes,
            rounds,
            torch.device(device),
            started=lambda name: progress.update(task, description=name),
            done=lambda: progress.advance(task),
        )
    result.write(folder)
    save_picture(result, folder / "quant.png")
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    print_result(result, Console())
    typer.echo(str(folder))


def _make(folder: Path) -> None:
    """Make the folder before anything is measured, and refuse to overwrite a result."""
    if (folder / "result.json").exists():
        typer.echo(f"fp8rl: {folder} holds a result already; choose another --out", err=True)
        raise typer.Exit(2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        typer.echo(f"fp8rl: {folder} cannot be made: {error}", err=True)
        raise typer.Exit(2) from error
