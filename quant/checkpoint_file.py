"""One safetensors file of a checkpoint: its header, checked, and plain reads of its tensors.

The file is 8 bytes (the header's length, little-endian), a JSON header, and the data:

    {"__metadata__": {..}, name: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..}

Offsets count from the end of the header and cover the data without gap or overlap. All of this is
checked when the file is opened, so a truncated or corrupt file is an error with its name and never
a wrong tensor. Tensors are read into the caller's memory: a memory map would count as memory used,
and a file that shrinks under one kills the process.

Source: the safetensors format, as its README defines it. Left out: dtypes of less than a byte.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import torch

from fp8rl.quant.errors import CheckpointFormatError

# The names of the format -> torch's, for the dtypes that checkpoints of language models hold.
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `offset` and `nbytes` count bytes from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in file order, and what tells it from a changed one."""

    path: Path
    size: int
    mtime_ns: int
    header_digest: str
    metadata: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]

    def is_unchanged(self) -> bool:
        """Whether the file still has the size and the time of change it was opened with."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


def open_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises CheckpointFormatError where it is truncated, corrupt, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            stat = path.stat()
            if len(prefix) < LENGTH_BYTES or length > stat.st_size - LENGTH_BYTES:
                raise CheckpointFormatError(
                    f"{path}: is truncated or no safetensors file: {stat.st_size} bytes, of which "
                    f"the header alone would take {LENGTH_BYTES} + {length}"
                )
            if length > _MAX_HEADER:
                raise CheckpointFormatError(
                    f"{path}: corrupt header: a length of {length} bytes, over {_MAX_HEADER}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error
    header = parse_json(path, raw, "header")
    metadata = header.pop("__metadata__", {})
    if not is_text_map(metadata):
        raise CheckpointFormatError(f"{path}: corrupt header: __metadata__ must map text to text")
    start = LENGTH_BYTES + length
    tensors = [_stored(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(path, tensors, start, stat.st_size)
    digest = hashlib.sha256(prefix + raw).hexdigest()
    return Shard(path, stat.st_size, stat.st_mtime_ns, digest, metadata, tuple(tensors))


def read_into(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes of a file from `offset` on.

    Raises CheckpointFormatError where the file ends before, or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            filled = 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])
                if not count:
                    raise CheckpointFormatError(
                        f"{path}: ended at byte {offset + filled} while being read; it changed "
                        "after its header was read, so run again when it is complete"
                    )
                filled += count
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error


def _stored(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    """One entry of a header, or the error that says what is wrong with it."""

    def corrupt(what: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{path}: corrupt header: tensor {name!r} {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(f"must have dtype, shape and data_offsets, found {entry!r:.100}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_counts(shape):
        raise corrupt(f"has shape {shape!r:.100}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"has data_offsets {offsets!r:.100}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointFormatError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r:.40}, which is not known here; "
            f"known: {', '.join(DTYPES)}"
        )
    dtype, nbytes = DTYPES[entry["dtype"]], offsets[1] - offsets[0]
    count = dtype.itemsize
    for size in shape:
        count *= size
    if count != nbytes:
        raise corrupt(f"{entry['dtype']} {shape} takes {count} bytes, its offsets give {nbytes}")
    return StoredTensor(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _check_cover(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Raise unless the tensors, sorted by offset, fill the file to its end."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointFormatError(f"{path}: corrupt header: tensor {tensor.name!r} {what}")
        end += tensor.nbytes
        if end > size:
            raise CheckpointFormatError(
                f"{path}: is truncated: tensor {tensor.name!r} ends at byte {end}, the file at "
                f"{size}; copy or download it again"
            )
    if end != size:
        raise CheckpointFormatError(
            f"{path}: is corrupt: {size - end} bytes after the last tensor belong to none"
        )


def parse_json(path: Path, raw: bytes, part: str) -> dict[str, Any]:
    """Parse a JSON object without repeated keys; CheckpointFormatError naming `path` and `part`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            repeated = next(k for k in keys if sum(k == key for key, _ in pairs) > 1)
            raise ValueError(f"key {repeated!r:.100} stands there twice")
        return keys

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path}: corrupt {part}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointFormatError(f"{path}: corrupt {part}: JSON, but no object")
    return parsed


def is_text_map(value: object) -> TypeGuard[dict[str, str]]:
    """Whether `value` is a mapping from text to text."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_counts(value: object) -> bool:
    """Whether `value` is a list of integers that are not negative."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )
