"""A shared-memory segment that no crash can leak.

The trainer creates an anonymous file in memory (``memfd_create``) and the engine opens it through
``/proc/<pid>/fd/<fd>``. It has no name in any folder, so the kernel frees it when the last of the
two processes closes it or dies, also by SIGKILL. Both must run as the same user in the same PID
namespace; for hosts that share no memory there are other transports.
"""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path

import psutil
import torch

from fp8rl.sync.errors import SegmentError


class Segment:
    """``nbytes`` of memory shared with another process, seen as a uint8 tensor."""

    def __init__(self, file_descriptor: int, nbytes: int, path: str, *, writable: bool) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._file_descriptor = file_descriptor
        mapped = mmap.mmap(file_descriptor, nbytes, access=access)
        self.nbytes = nbytes
        self.path = path
        with warnings.catch_warnings():  # torch warns that a read-only buffer must not be written
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Make a zero-filled segment; raises SegmentError where memory does not suffice."""
        if nbytes <= 0:
            raise SegmentError(f"a segment of {nbytes} bytes cannot be made")
        available = psutil.virtual_memory().available
        if nbytes > available:  # asked first: the kernel would allocate until it kills somebody
            raise SegmentError(f"a segment of {nbytes} bytes, but {available} bytes are free")
        file_descriptor = os.memfd_create("fp8rl-weights")
        try:
            os.posix_fallocate(file_descriptor, 0, nbytes)  # fail now, not by SIGBUS later
        except OSError as error:
            os.close(file_descriptor)
            raise SegmentError(f"no memory for a segment of {nbytes} bytes: {error}") from error
        path = f"/proc/{os.getpid()}/fd/{file_descriptor}"
        return cls(file_descriptor, nbytes, path, writable=True)

    @classmethod
    def attach(cls, path: str, nbytes: int) -> Segment:
        """Open another process's segment for reading.

        Raises:
            SegmentError: the path is no segment of this machine, has vanished, or its size differs.
        """
        parts = Path(path).parts
        plain = len(parts) == 5 and parts[:2] == ("/", "proc") and parts[3] == "fd"
        if not (plain and parts[2].isdecimal() and parts[4].isdecimal()):
            raise SegmentError(f"{path!r} is not a segment's path (/proc/<pid>/fd/<fd>)")
        try:
            if not os.readlink(path).startswith("/memfd:fp8rl-weights"):
                raise SegmentError(f"{path} is not a segment of fp8rl; restart the trainer")
            file_descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SegmentError(f"segment {path} cannot be opened: {error}") from error
        found = os.fstat(file_descriptor).st_size
        if found != nbytes:
            os.close(file_descriptor)
            raise SegmentError(f"segment {path} holds {found} bytes, expected {nbytes}")
        return cls(file_descriptor, nbytes, path, writable=False)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 ``[nbytes]`` of the segment; shares its memory."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise SegmentError(
                f"bytes {offset}..{offset + nbytes} lie outside the segment of {self.nbytes} bytes"
            )
        return self.bytes[offset : offset + nbytes]

    def close(self) -> None:
        """Give the memory back, once the last view of it is gone."""
        if self._file_descriptor >= 0:
            os.close(self._file_descriptor)
            self._file_descriptor = -1
        self.bytes = torch.empty(0, dtype=torch.uint8)
