"""The command line of the benchmarks: `fp8rl bench quant`, `rollout`, `sync`, `kv-scales`, ..."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8rl.bench.correction_command import CORRECTION_EXAMPLES, correction
from fp8rl.bench.folders import make
from fp8rl.bench.rollout_command import ROLLOUT_EXAMPLES, rollout

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

KV_SCALES_EXAMPLES = """
Examples:

- `fp8rl bench kv-scales`: all shapes and both ways to measure, some five minutes on two cores

- `fp8rl bench kv-scales --model none`: the share of the demo's step alone

- `fp8rl bench kv-scales --model qwen3-8b --measured-by none`: the hook alone
"""

DENSITY_EXAMPLES = """
Examples:

- `fp8rl bench density`: Gaussian masters and the real loop, some two minutes on two cores

- `fp8rl bench density --steps 0`: Gaussian masters alone, without an engine
"""


SYNC_EXAMPLES = """
Examples:

- `fp8rl bench sync`: a model of 0.3 B weights, some three minutes on two cores

- `fp8rl bench sync --shape qwen3-0.6b`: twice as large, with an embedding of 152 k tokens

- `fp8rl bench sync --shape tiny --rounds 1`: whether it runs here
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
    make(folder)
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
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))


app.command(epilog=ROLLOUT_EXAMPLES)(rollout)
app.command(epilog=CORRECTION_EXAMPLES)(correction)


@app.command("kv-scales", epilog=KV_SCALES_EXAMPLES)
def kv_scales(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json, kv-scales.png and the runs go; runs/bench-kv-scales-DATE-TIME "
            "unless given.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        Literal["all", "demo", "qwen3-0.6b", "qwen3-8b", "none"],
        typer.Option(help="Model shape whose forward is watched; a few layers of it."),
    ] = "all",
    measured_by: Annotated[
        Literal["both", "trainer", "engine", "none"],
        typer.Option(help="Who measures the scales in the steps; none leaves the steps out."),
    ] = "both",
    rounds: Annotated[
        int, typer.Option(min=3, help="Turns of each way; ratios are taken within a round.")
    ] = 15,
    steps: Annotated[
        int, typer.Option(min=3, help="Steps of the demo, for each who measures.")
    ] = 8,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Time the recalibration of KV scales: the hook in a forward, and its share of a step.

    Forwards alone and watched take turns in one process; the steps are those of the demo, with a
    live engine. The last line printed is the folder with result.json and kv-scales.png.
    """
    from rich.console import Console

    from fp8rl.bench.kv_scales import bench_kv_scales
    from fp8rl.bench.kv_scales_forward import SHAPES
    from fp8rl.bench.kv_scales_report import print_result, save_picture
    from fp8rl.config.run import RunConfig, WarmupConfig

    if (model, measured_by) == ("none", "none"):
        typer.echo("fp8rl: --model none and --measured-by none leave nothing to measure", err=True)
        raise typer.Exit(2)
    folder = out or Path("runs") / f"bench-kv-scales-{datetime.now():%Y%m%d-%H%M%S}"
    make(folder)
    names = {"all": list(SHAPES), "none": []}.get(model, [model])
    result = bench_kv_scales(
        [SHAPES[name] for name in names],
        rounds,
        RunConfig(steps=steps, warmup=WarmupConfig(steps=50)),
        {"both": ["trainer", "engine"], "none": []}.get(measured_by, [measured_by]),
        folder,
        started=partial(typer.echo, err=True),
    )
    result.write(folder)
    save_picture(result, folder / "kv-scales.png")
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))


@app.command(epilog=DENSITY_EXAMPLES)
def density(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json, density.png and the run go; runs/bench-density-DATE-TIME "
            "unless given.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Steps of the loop at each learning rate; 0 leaves it out.")
    ] = 6,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Count what an optimizer step changes of a model, in BF16 and in FP8, and weigh the deltas.

    At learning rates 1e-6, 3e-6 and 1e-5, on Gaussian masters and in the demo's loop with a live
    engine. The last line printed is the folder with result.json and density.png.
    """
    from rich.console import Console

    from fp8rl.bench.density import bench_density
    from fp8rl.bench.density_report import print_result, save_picture
    from fp8rl.config.run import RunConfig

    folder = out or Path("runs") / f"bench-density-{datetime.now():%Y%m%d-%H%M%S}"
    make(folder)
    result = bench_density(RunConfig(), steps, folder, started=partial(typer.echo, err=True))
    result.write(folder)
    save_picture(result, folder / "density.png")
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))


@app.command(epilog=SYNC_EXAMPLES)
def sync(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json, sync.png and the engines' logs go; runs/bench-sync-DATE-TIME "
            "unless given.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        Literal["0.3b", "qwen3-0.6b", "tiny"], typer.Option(help="Model whose weights are moved.")
    ] = "0.3b",
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each way; ratios are taken within a round.")
    ] = 5,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Time a publish, full and delta, beside other ways to bring weights into a live engine.

    These are BF16 quantized by the receiver, vLLM's reload_weights from disk, and a memcpy with the
    engine's load. The last line printed is the folder with result.json and sync.png.
    """
    # Trainer and engines take turns on the same cores: idle threads must not spin on them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    from rich.console import Console

    from fp8rl.bench.sync import bench_sync
    from fp8rl.bench.sync_model import SHAPES
    from fp8rl.bench.sync_report import print_result, save_picture
    from fp8rl.errors import ConfigError, EngineError

    folder = out or Path("runs") / f"bench-sync-{datetime.now():%Y%m%d-%H%M%S}"
    make(folder)
    try:
        result = bench_sync(SHAPES[shape], rounds, folder, started=partial(typer.echo, err=True))
    except (ConfigError, EngineError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
    result.write(folder)
    save_picture(result, folder / "sync.png")
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))
