"""`fp8rl bench rollout`, as the command line has it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8rl.bench.folders import make

ROLLOUT_EXAMPLES = """
Examples:

- `fp8rl bench rollout --shape 0.3b`: random weights, all arms

- `fp8rl bench rollout models/Qwen3-0.6B --arms bf16,fp8 --batches 1,8,32`: a checkpoint, two arms

- `fp8rl bench rollout --shape 0.3b --batches 32 --kv-cache-gib 0.2`: a KV cache so small that
  requests are preempted

- `fp8rl bench rollout models/Qwen3-8B --device cuda --batches 64,256 --tokens 1024 --lengths 4096`:
  on a GPU
"""


def rollout(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a Hugging Face checkpoint in BF16. Left out with --shape.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        Literal["tiny", "0.3b", "qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b"] | None,
        typer.Option(help="Random weights of this shape instead.", show_default=False),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Of bf16, fp8 (weights), fp8-w8a8 (on a CPU: activations too), kv-only, fp8-kv; "
            "with commas, all that the device has unless given.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="Responses at once.")] = "1,2,4,8,16,32",
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of each response, for all batch sizes.")
    ] = 64,
    lengths: Annotated[
        str, typer.Option(help="Other lengths of responses, eight at once; none leaves them out.")
    ] = "16,256",
    prompt: Annotated[int, typer.Option(min=4, help="Tokens of each prompt.")] = 64,
    update_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rollouts of the largest batch after each weight update, whose time counts; 0 "
            "leaves updates out.",
        ),
    ] = 1,
    rounds: Annotated[
        int, typer.Option(min=1, help="Fresh engines of every arm; ratios are within a round.")
    ] = 3,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where engines run; cuda needs a GPU and vllm.")
    ] = "cpu",
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            help="KV cache of every arm on a CPU; what the largest point needs in BF16 unless "
            "given.",
            show_default=False,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=0.99,
            help="Share of a GPU that an engine takes; 0.9 unless given.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where result.json, rollout.png and the engines' logs go; "
            "runs/bench-rollout-DATE-TIME unless given. One that has rounds is gone on with.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="End with the result as one JSON object on the last line."),
    ] = False,
) -> None:
    """Measure rollouts in BF16, with FP8 weights and with an FP8 KV cache, on live engines.

    Tokens a second, time to and per token, KV capacity, preemptions and memory, against batch size
    and length, and with weight updates. The last line printed is the folder with result.json and
    rollout.png.
    """
    # Bench and engines take turns on the same cores: idle threads must not spin on them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fp8rl.bench.rollout import Bench, Engines, Workload, bench_rollout
    from fp8rl.bench.rollout_arms import ARMS, W8A8
    from fp8rl.bench.rollout_model import Subject
    from fp8rl.bench.rollout_report import print_result, save_picture
    from fp8rl.errors import ConfigError, EngineError
    from fp8rl.quant.errors import CheckpointFormatError, QuantPlanError

    if (model is None) == (shape is None):
        raise typer.BadParameter("give a checkpoint's folder or --shape, one of the two")
    cuda = device == "cuda"
    if cuda and kv_cache_gib is not None:
        raise typer.BadParameter(
            "is for a CPU; with --device cuda, --gpu-memory says what an engine takes",
            param_hint="--kv-cache-gib",
        )
    if not cuda and gpu_memory is not None:
        raise typer.BadParameter(
            "is for --device cuda; on a CPU, --kv-cache-gib says what the KV cache takes",
            param_hint="--gpu-memory",
        )
    if cuda and not torch.cuda.is_available():
        typer.echo(
            "fp8rl: --device cuda, but torch finds no CUDA device; use --device cpu", err=True
        )
        raise typer.Exit(2)
    known = [arm for arm in ARMS if not (cuda and arm == W8A8)]  # there fp8 is W8A8
    chosen = known if arms is None else [arm.strip() for arm in arms.split(",")]
    if unknown := [arm for arm in chosen if arm not in known]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: on {device} there are {', '.join(known)}", param_hint="--arms"
        )
    work = Workload(
        _numbers(batches, "--batches"),
        tokens,
        () if lengths == "none" else _numbers(lengths, "--lengths"),
        prompt,
        update_every,
    )
    kv_bytes = None if kv_cache_gib is None else round(kv_cache_gib * 2**30)
    engines = Engines(cuda, kv_bytes, gpu_memory or Engines.gpu_memory)
    folder = out or Path("runs") / f"bench-rollout-{datetime.now():%Y%m%d-%H%M%S}"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        if shape is not None:
            subject = Subject.of_shape(shape, work.longest)
        else:
            assert model is not None  # one of the two was given
            subject = Subject.of_checkpoint(model)
        bench = Bench(subject, chosen, work, engines)
        make(folder)
        typer.echo(f"{bench.subject.described()}; {', '.join(chosen)}; {folder}", err=True)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=rounds * len(chosen) * len(work.points()))
            result = bench_rollout(
                bench,
                rounds,
                folder,
                doing=lambda name: progress.update(task, description=name),
                done=lambda: progress.advance(task),
            )
    except (ConfigError, CheckpointFormatError, QuantPlanError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        raise typer.Exit(2) from error
    except EngineError as error:
        typer.echo(
            f"fp8rl: {error}\nthe rounds that were done are kept: repeat the command with "
            f"--out {folder} to go on",
            err=True,
        )
        raise typer.Exit(1) from error
    result.write(folder)
    save_picture(result, folder / "rollout.png")
    if not as_json:
        print_result(result, Console())
    typer.echo(json.dumps(asdict(result)) if as_json else str(folder))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Positive integers with commas between them, in order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r}: give positive integers with commas, such as 1,8,32", param_hint=option
        )
    return tuple(sorted({int(part) for part in parts}))
