"""Convert a Hugging Face checkpoint to blockwise FP8, and back, without holding it in memory.

Each of some threads takes a chunk, reads it, quantizes it on one core and writes it. Memory is that
of a dozen chunks, a few MiB each, whatever the size of a tensor or a shard. The destination appears
complete or not at all, and a conversion that was killed goes on where it was (convert_state.py).

Back: values never change, since a dequantized pow2 value fits in bf16. Quantizing them again gives
the same bytes, but for blocks whose largest code is exactly 224 (blockwise.py says why).

Left out: conversion on a GPU (reading and writing take longer than quantizing on a CPU).
"""

import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from fp8rl.quant.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from fp8rl.quant.checkpoint_errors import ErrorSums, TensorError, tensor_error
from fp8rl.quant.checkpoint_extras import copy_extras, extras_of
from fp8rl.quant.checkpoint_writer import FileLayout, write_at, write_file
from fp8rl.quant.convert_chunk import CHUNK, Chunk, chunks_of, convert_chunk, read_chunk
from fp8rl.quant.convert_plan import ConversionPlan, ConvertOptions, FilePlan, plan_conversion
from fp8rl.quant.convert_state import Workspace
from fp8rl.quant.errors import CheckpointFormatError, ConversionError
from fp8rl.quant.plan import QuantPlan

WAITING: Final = 2  # threads more than cores, for those that wait for the disk
MARK_BYTES: Final = 64 * 2**20  # of the source, between two marks on the disk


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    resumed_bytes: of the source, done by runs before this one. choice: which tensors are quantized
    and why; None for a conversion back. errors: of the quantized tensors, worst first; empty unless
    measured.
    """

    source: Path
    destination: Path
    source_bytes: int
    destination_bytes: int
    resumed_bytes: int
    largest_shard_bytes: int
    converted_tensors: int
    other_tensors: int
    choice: QuantPlan | None
    errors: tuple[TensorError, ...]


class Progress(NamedTuple):
    """How far a conversion is, in bytes of the source."""

    done: int
    total: int
    file: str


def convert_checkpoint(
    source: Path,
    destination: Path,
    options: ConvertOptions,
    *,
    force: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    before_placing: Callable[[Path, Conversion], None] | None = None,
) -> Conversion:
    """Convert the checkpoint in folder `source` to folder `destination`.

    force: replace what is at the destination, and drop a conversion begun otherwise.
    before_placing: called with the complete folder before it becomes the destination.

    Raises CheckpointFormatError (source), ConversionError (options, destination, room),
    QuantPlanError (model), NonFiniteWeightError (a value), CheckpointWriteError (the disk). After
    any of them there is no new destination; the same call goes on from what is done.
    """
    source, destination = Path(os.path.abspath(source)), Path(os.path.abspath(destination))
    _check_places(source, destination, force=force)
    checkpoint = Checkpoint.open(source)
    plan = plan_conversion(checkpoint, options)
    with Workspace.locked(destination, _state(checkpoint, options), force=force) as work:
        _check_begun(work, plan)
        _check_room(work, plan, source)
        resumed = _convert_files(work, plan, options, on_progress)
        copy_extras(source, work.files)
        _write_index(work.files, checkpoint, plan)
        write_file(work.files / CONFIG_FILE, json.dumps(plan.config, indent=2).encode() + b"\n")
        result = _result(checkpoint, work, plan, resumed)
        if before_placing is not None:
            before_placing(work.files, result)
        work.place()
    return result


def _check_places(source: Path, destination: Path, *, force: bool) -> None:
    a, b = source.resolve(), destination.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConversionError(
            f"{destination}: source and destination must be two folders, neither inside the other; "
            f"the source is {source}"
        )
    taken = destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
    if taken and not force:
        raise ConversionError(
            f"{destination}: is there already; choose another destination, or replace it with "
            "--force"
        )


def _state(checkpoint: Checkpoint, options: ConvertOptions) -> dict[str, Any]:
    """What must be the same for a conversion to go on."""
    files: dict[str, Any] = {
        shard.path.name: [shard.size, shard.mtime_ns, shard.header_digest]
        for shard in checkpoint.shards
    }
    return {
        "chunk": CHUNK,
        "options": dataclasses.asdict(options),
        "source": {CONFIG_FILE: checkpoint.config_digest, **files},
    }


def _check_begun(work: Workspace, plan: ConversionPlan) -> None:
    """Raise unless the files that are begun have their size."""
    for file in plan.files:
        path = work.files / file.layout.file
        if file.layout.file not in work.done:
            continue
        if not path.is_file() or path.stat().st_size != file.layout.size:
            raise ConversionError(
                f"{path}: is not as it was left; delete {work.folder} to start over"
            )


def _check_room(work: Workspace, plan: ConversionPlan, source: Path) -> None:
    """Raise where the disk has less room than what is still to be made, before making it."""
    files = [file.layout for file in plan.files if file.layout.file not in work.done]
    needed = sum(layout.size for layout in files) + sum(e.stat().st_size for e in extras_of(source))
    free = shutil.disk_usage(work.folder).free
    if needed > free:
        raise ConversionError(
            f"{work.folder}: not enough room: {needed / 2**20:,.0f} MiB are still to be written "
            f"and {free / 2**20:,.0f} MiB are free; make room, or choose a destination elsewhere"
        )


def _convert_files(
    work: Workspace,
    plan: ConversionPlan,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
) -> int:
    """Fill every file; return the bytes of the source that were done before."""
    files = [
        (file, [chunk for part in file.parts for chunk in chunks_of(part, plan.block_size)])
        for file in plan.files
    ]
    total = sum(chunk.nbytes for _, chunks in files for chunk in chunks)
    resumed = sum(
        chunk.nbytes
        for file, chunks in files
        for chunk in chunks[: work.done.get(file.layout.file, 0)]
    )
    done = resumed
    for file, chunks in files:
        for nbytes in chain([0], _convert_file(work, file, chunks, options)):
            done += nbytes
            if on_progress is not None:
                on_progress(Progress(done, total, file.layout.file))
    return resumed


def _convert_file(
    work: Workspace, file: FilePlan, chunks: Sequence[Chunk], options: ConvertOptions
) -> Iterator[int]:
    """Convert what is left of a file; yield the source's bytes of each chunk that is written."""
    name = file.layout.file
    if name not in work.done:
        file.layout.create(work.files)
        work.mark(name, 0)
    number, unmarked = work.done[name], 0
    for chunk, sums in _pipeline(chunks[number:], work.files / name, file.layout, options):
        if sums is not None:
            work.add_error(chunk.part.source.name, sums)
        number, unmarked = number + 1, unmarked + chunk.nbytes
        if unmarked >= MARK_BYTES or number == len(chunks):
            if not file.shard.is_unchanged():
                raise CheckpointFormatError(
                    f"{file.shard.path}: has changed while it was read; run again when it is whole"
                )
            work.mark(name, number)
            unmarked = 0
        yield chunk.nbytes


def _pipeline(
    chunks: Sequence[Chunk], path: Path, layout: FileLayout, options: ConvertOptions
) -> Iterator[tuple[Chunk, ErrorSums | None]]:
    """Convert many chunks at once; yield each, in order, when it is written."""

    def convert(chunk: Chunk) -> ErrorSums | None:
        inputs = read_chunk(chunk)
        outputs, sums = convert_chunk(chunk, inputs, options.fp32_as, measure=options.report)
        _write(path, chunk.offsets(layout), outputs)
        return sums

    cores, coming = torch.get_num_threads(), iter(chunks)
    pool = ThreadPoolExecutor(cores + WAITING, initializer=torch.set_num_threads, initargs=(1,))
    running: deque[tuple[Chunk, Future[ErrorSums | None]]] = deque()
    try:
        for _ in chunks:
            for chunk in islice(coming, 2 * (cores + WAITING) - len(running)):
                running.append((chunk, pool.submit(convert, chunk)))
            chunk, future = running.popleft()
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # what the pool's threads set is the default of new threads


def _write(path: Path, offsets: Sequence[int], outputs: Sequence[bytearray]) -> None:
    for offset, output in zip(offsets, outputs, strict=True):
        write_at(path, offset, memoryview(output))


def _write_index(folder: Path, checkpoint: Checkpoint, plan: ConversionPlan) -> None:
    """The index of the new files, where the source has one."""
    if not (checkpoint.folder / INDEX_FILE).exists():
        return
    tensors = [(t, file.layout.file) for file in plan.files for t in file.layout.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)},
        "weight_map": {
            tensor.name: file for tensor, file in sorted(tensors, key=lambda t: t[0].name)
        },
    }
    write_file(folder / INDEX_FILE, json.dumps(index, indent=2).encode() + b"\n")


def _result(
    checkpoint: Checkpoint, work: Workspace, plan: ConversionPlan, resumed: int
) -> Conversion:
    parts = [part for file in plan.files for part in file.parts]
    converted = [part.source for part in parts if part.action in ("quantize", "dequantize")]
    errors = [
        tensor_error(tensor.name, tensor.shape, plan.block_size, work.errors[tensor.name])
        for tensor in converted
        if tensor.name in work.errors
    ]
    errors.sort(key=lambda error: (-error.relative_rms, error.name))
    return Conversion(
        source=checkpoint.folder,
        destination=work.destination,
        source_bytes=sum(shard.size for shard in checkpoint.shards),
        destination_bytes=sum(file.layout.size for file in plan.files),
        resumed_bytes=resumed,
        largest_shard_bytes=max(shard.size for shard in checkpoint.shards),
        converted_tensors=len(converted),
        other_tensors=len(parts) - len(converted),
        choice=plan.choice,
        errors=tuple(errors),
    )
