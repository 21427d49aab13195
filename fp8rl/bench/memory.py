"""How much memory a process takes, as Linux counts it: what is resident, shared memory included."""

from __future__ import annotations

import ctypes
from pathlib import Path

SELF = "self"


def can_tell() -> bool:
    """Whether this system can: it needs Linux and glibc."""
    return hasattr(ctypes.CDLL(None), "malloc_trim") and _file(SELF, "clear_refs").exists()


def give_back() -> None:
    """Have the C library give back what it keeps for reuse in this process."""
    ctypes.CDLL(None).malloc_trim(0)


def resident(process: int | str = SELF) -> int:
    """Bytes that are resident now."""
    return _status(process, "VmRSS")


def start_high_water_mark(process: int | str = SELF) -> None:
    """Let the high-water mark start anew from what is resident now."""
    _file(process, "clear_refs").write_text("5")


def high_water_mark(process: int | str = SELF) -> int:
    """Bytes that were resident at most, since the mark was started."""
    return _status(process, "VmHWM")


def _status(process: int | str, field: str) -> int:
    lines = _file(process, "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _file(process: int | str, name: str) -> Path:
    return Path("/proc") / str(process) / name
