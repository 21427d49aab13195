"""What ``fp8rl quantize`` does: convert, show how far it is, say what came of it.

On a terminal there is a progress bar; elsewhere a line every few seconds. Memory is measured by the
kernel (the highest resident size), from when everything was loaded to when the last file was whole.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from fp8rl.lifeline import STOPPED
from fp8rl.quant.checkpoint_errors import TensorError
from fp8rl.quant.checkpoint_extras import REPORT_FOLDER
from fp8rl.quant.convert import Conversion, Progress, convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions
from fp8rl.quant.errors import (
    CheckpointFormatError,
    CheckpointWriteError,
    ConversionError,
    NonFiniteWeightError,
    QuantPlanError,
)
from fp8rl.quantize_report import percent_text, write_report

LINE_SECONDS = 5.0  # between two lines where there is no terminal
SHOWN_WORST = 10  # tensors, on the terminal
MIB = 2**20


def run(
    source: Path, destination: Path, options: ConvertOptions, *, force: bool, as_json: bool
) -> int:
    """Convert and report; return the exit code."""
    console = Console(stderr=True)
    began, before = time.monotonic(), _memory("VmRSS")
    result: dict[str, Any] = {}

    def complete(folder: Path, conversion: Conversion) -> None:
        peak = max(_memory("VmHWM"), before)  # the kernel brings both up to date now and then
        seconds = time.monotonic() - began
        result.update(_result(conversion, options, before, peak, seconds))
        if options.report:
            title = f"Quantization error of {source.resolve().name}"
            write_report(folder, conversion.errors, result, title)

    try:
        with _shown(console) as on_progress:
            conversion = convert_checkpoint(
                source,
                destination,
                options,
                force=force,
                on_progress=on_progress,
                before_placing=complete,
            )
    except (CheckpointFormatError, ConversionError, QuantPlanError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        return 2
    except (CheckpointWriteError, NonFiniteWeightError) as error:
        typer.echo(f"fp8rl: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        typer.echo(f"{STOPPED}; the same command goes on where it was", err=True)
        return 130
    _print_summary(console, conversion, result)
    typer.echo(json.dumps(result) if as_json else str(conversion.destination))
    return 0


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Show progress as it is reported."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def show(progress: Progress) -> None:
            bar.update(
                task, description=progress.file, completed=progress.done, total=progress.total
            )

        yield show


class _Lines:
    """A line of progress every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            done = f"{100 * progress.done / max(progress.total, 1):.0f} %"
            text = f"{done} of {progress.total / MIB:,.0f} MiB  {progress.file}"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _result(
    conversion: Conversion, options: ConvertOptions, before: int, peak: int, seconds: float
) -> dict[str, Any]:
    """Everything about a conversion but the tensors' errors, as JSON values."""
    choice = conversion.choice
    entries = choice.entries if choice is not None else ()
    kept = {entry.name: entry.reason for entry in entries if not entry.quantized}
    errors = conversion.errors
    return {
        "command": shlex.join(["fp8rl", *sys.argv[1:]]),
        "source": str(conversion.source),
        "destination": str(conversion.destination),
        "options": asdict(options),
        "source_bytes": conversion.source_bytes,
        "destination_bytes": conversion.destination_bytes,
        "resumed_bytes": conversion.resumed_bytes,
        "converted_tensors": conversion.converted_tensors,
        "other_tensors": conversion.other_tensors,
        "by_rule": choice is not None and choice.by_rule,
        "kept": kept,
        "worst": None if not errors else _finite(asdict(errors[0])),
        "seconds": seconds,
        "memory_before_bytes": before,
        "memory_peak_bytes": peak,
        "largest_shard_bytes": conversion.largest_shard_bytes,
        "memory_in_largest_shards": (peak - before) / conversion.largest_shard_bytes,
    }


def _print_summary(console: Console, conversion: Conversion, result: dict[str, Any]) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    choice = conversion.choice
    if choice is not None and choice.by_rule:
        say(
            "The architecture is not known: which tensors are linears was guessed from their names "
            "and shapes. Read what was kept before you rely on it.",
            "yellow",
        )
    what = "dequantized to BF16" if choice is None else "quantized to FP8"
    say(f"{conversion.converted_tensors} tensors {what}, {conversion.other_tensors} as they were")
    for reason, count in Counter(result["kept"].values()).most_common():
        say(f"  {count}  {reason}", "dim")
    sizes = conversion.source_bytes, conversion.destination_bytes
    say(
        f"{sizes[0] / MIB:,.0f} MiB -> {sizes[1] / MIB:,.0f} MiB in {result['seconds']:.1f} s"
        + (
            f", {conversion.resumed_bytes / MIB:,.0f} MiB of it by an earlier run"
            if conversion.resumed_bytes
            else ""
        )
    )
    grown = result["memory_peak_bytes"] - result["memory_before_bytes"]
    say(
        f"memory: {grown / MIB:,.0f} MiB above the {result['memory_before_bytes'] / MIB:,.0f} MiB "
        f"of the program, {result['memory_in_largest_shards']:.2f} of the largest shard"
    )
    if conversion.errors:
        console.print(_worst_table(conversion.errors[:SHOWN_WORST]))
        say(f"all {len(conversion.errors)}: {conversion.destination / REPORT_FOLDER}")


def _worst_table(errors: tuple[TensorError, ...]) -> Table:
    table = Table(title="worst tensors", title_justify="left", box=None)
    table.add_column("tensor", overflow="fold")
    for heading in ("relative RMS", "SQNR dB", "saturated", "zero blocks"):
        table.add_column(heading, justify="right")
    for error in errors:
        table.add_row(
            error.name,
            f"{100 * error.relative_rms:.3g} %",
            f"{error.sqnr_db:.1f}",
            percent_text(error.saturated),
            f"{error.zero_blocks} of {error.blocks}",
        )
    return table


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same without infinities, which JSON has not."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _memory(field: str) -> int:
    """A size of this process, bytes: VmRSS (now) or VmHWM (at most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}, so memory cannot be measured")
