"""Shared memory that is seen by the other side and freed by the kernel, whoever dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8rl.sync.errors import SegmentError
from fp8rl.sync.segment import Segment


def test_what_one_side_writes_the_other_reads() -> None:
    ours = Segment.create(4096)
    theirs = Segment.attach(ours.path, 4096)
    ours.view(64, 4).copy_(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    assert theirs.view(64, 4).tolist() == [1, 2, 3, 4]
    theirs.close()
    ours.close()


def test_another_process_can_attach() -> None:
    segment = Segment.create(4096)
    segment.bytes.fill_(7)
    code = (
        "import sys; from fp8rl.sync.segment import Segment;"
        "print(int(Segment.attach(sys.argv[1], 4096).bytes.sum()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, segment.path], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) == 7 * 4096
    segment.close()


def test_no_name_is_left_anywhere() -> None:
    before = set(os.listdir("/dev/shm"))
    segment = Segment.create(1 << 20)
    assert set(os.listdir("/dev/shm")) == before
    path = Path(segment.path)
    segment.close()
    assert not path.exists()


def test_memory_is_freed_when_the_owner_is_killed() -> None:
    code = (
        "import time; from fp8rl.sync.segment import Segment;"
        "s = Segment.create(1 << 20); print(s.path, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = process.stdout.readline().strip()
    process.kill()
    process.wait()
    with pytest.raises(SegmentError, match="cannot be opened"):
        Segment.attach(path, 1 << 20)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/proc/self/mem", "/proc/1/fd/../mem", "/dev/shm/x", "", "/proc/a/fd/1"]
)
def test_a_path_that_is_no_segment_is_refused(path: str) -> None:
    with pytest.raises(SegmentError):
        Segment.attach(path, 4096)


def test_a_file_that_is_no_segment_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("wb+") as file:
        file.write(bytes(4096))
        with pytest.raises(SegmentError, match="not a segment of fp8rl"):
            Segment.attach(f"/proc/{os.getpid()}/fd/{file.fileno()}", 4096)


def test_sizes_are_checked() -> None:
    segment = Segment.create(4096)
    with pytest.raises(SegmentError, match="4096 bytes, expected 8192"):
        Segment.attach(segment.path, 8192)
    with pytest.raises(SegmentError, match="outside the segment"):
        segment.view(4090, 10)
    with pytest.raises(SegmentError, match="outside the segment"):
        segment.view(-1, 10)
    segment.close()
    with pytest.raises(SegmentError, match="bytes are free"):
        Segment.create(1 << 50)
    with pytest.raises(SegmentError, match="cannot be made"):
        Segment.create(0)
