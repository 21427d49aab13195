"""Run in a process of its own: a conversion in many small chunks that is killed at a chosen moment.

Usage: python -m tests.quant.convert_worker SOURCE DESTINATION FORCE WHEN, with WHEN one of `wait`
(stop at the second chunk until killed from outside), `chunk N`, `complete` (all is written, nothing
is in place), `rename N` (before the Nth rename that puts it in place).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fp8rl.quant import convert, convert_chunk
from fp8rl.quant.convert_plan import ConvertOptions

CHUNK = 2**14
MARK_BYTES = 2**16


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(source: str, destination: str, force: str, *when: str) -> None:
    convert_chunk.CHUNK = convert.CHUNK = CHUNK
    convert.MARK_BYTES = MARK_BYTES
    moment, count = when[0], itertools.count(0)
    rename = Path.rename

    def on_progress(progress: convert.Progress) -> None:
        number = next(count)
        if moment == "chunk" and number == int(when[1]):
            die()
        if moment == "wait" and number == 2:
            print("waiting", flush=True)
            time.sleep(600)

    def before_placing(folder: Path, result: convert.Conversion) -> None:
        if moment == "complete":
            die()
        renames = itertools.count(1)

        def dying(self: Path, target: Any) -> Path:
            if moment == "rename" and next(renames) == int(when[1]):
                die()
            return rename(self, target)

        Path.rename = dying  # type: ignore[method-assign]

    convert.convert_checkpoint(
        Path(source),
        Path(destination),
        ConvertOptions(report=True),
        force=force == "force",
        on_progress=on_progress,
        before_placing=before_placing,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
