"""One safetensors file of a destination: its layout is fixed first, then any part of it is written.

Names, dtypes and shapes decide every offset, so the header and the full size are there before any
data, and parts can be written in any order, by several threads, and again after a kill. The widest
dtypes come first and the header is padded to 8 bytes: every tensor is aligned, as readers that map
the file want it.

Source: the safetensors format, as its README defines it.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8rl.quant.checkpoint_file import DTYPE_NAMES, LENGTH_BYTES
from fp8rl.quant.errors import CheckpointWriteError

_ALIGNMENT = 8  # bytes; the widest dtype


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """Where everything lies in one file; make one with `of`.

    head: the first bytes, with the header. offsets: tensor -> bytes from the file's start.
    """

    file: str
    tensors: tuple[OutputTensor, ...]
    head: bytes
    offsets: Mapping[str, int]
    size: int

    @classmethod
    def of(
        cls, file: str, tensors: Iterable[OutputTensor], metadata: Mapping[str, str]
    ) -> "FileLayout":
        """Lay out a file; names must differ."""
        ordered = tuple(sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name)))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        relative, end = {}, 0
        for tensor in ordered:
            relative[tensor.name] = end
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        head = len(text).to_bytes(LENGTH_BYTES, "little") + text
        offsets = {name: len(head) + offset for name, offset in relative.items()}
        return cls(file, ordered, head, offsets, len(head) + end)

    def create(self, folder: Path) -> None:
        """Make the file anew at its full size, with its header, so that its room is taken."""
        path = folder / self.file
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.size)
                file.write(self.head)
        except OSError as error:
            raise write_error(path, error) from error


def write_at(path: Path, offset: int, data: memoryview) -> None:
    """Write bytes into a file that `FileLayout.create` made; any thread may."""
    try:
        with path.open("r+b", buffering=0) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]
    except OSError as error:
        raise write_error(path, error) from error


def sync_path(path: Path) -> None:
    """Bring a file's data, or a folder's entries, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that a kill at any moment leaves the old one or the new one, whole."""
    beside = path.with_name(f"{path.name}.new")
    try:
        beside.write_bytes(data)
        sync_path(beside)
        beside.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    sync_path(path.parent)


def write_error(path: Path, error: OSError) -> CheckpointWriteError:
    """The error for a file that could not be written, with what to do."""
    return CheckpointWriteError(
        f"{path}: cannot be written: {error.strerror}. What is complete is kept: mend that and run "
        "the same command again to continue"
    )
