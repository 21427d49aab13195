"""A conversion under way: a folder beside the destination, renamed into place when all is there.

    DST.partial/lock             held by the process that converts
    DST.partial/state.json       what is being made: options, and size, time and header of each file
    DST.partial/progress.jsonl   how far: a line is added once what it counts is on the disk
    DST.partial/files/           the destination to be
    DST.partial/replaced/        what was at DST, between the two renames of a replacement

A kill at any moment leaves this folder, and the next run goes on from the last line; a torn one is
dropped. Where options or source are no longer those of state.json, going on would mix two models,
so that is refused, or on `force` begun anew.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp8rl.quant.checkpoint_errors import ErrorSums
from fp8rl.quant.checkpoint_writer import sync_path, write_error, write_file
from fp8rl.quant.errors import ConversionError

Errors = dict[str, list[ErrorSums]]

STATE_FORMAT: Final = 1  # raise it when the meaning of a chunk's number changes


@dataclass
class Workspace:
    """The folder of one conversion; make one with `locked`.

    done: file of the destination -> its chunks that are on the disk; one that is not in it is not
    begun. errors: tensor -> sums of its chunks among them.
    """

    destination: Path
    done: dict[str, int] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)
    _new_errors: Errors = field(default_factory=dict, repr=False)

    @classmethod
    @contextmanager
    def locked(
        cls, destination: Path, state: Mapping[str, Any], *, force: bool
    ) -> Iterator["Workspace"]:
        """Begin a conversion, or go on with the one that was begun.

        Raises ConversionError where another process is at it, and where `state` is not that of the
        one begun (with `force` that one is dropped).
        """
        work = cls(destination)
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
            lock = (work.folder / "lock").open("a+")
        except OSError as error:
            raise write_error(work.folder, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConversionError(
                    f"{work.folder}: another process is converting there; wait for it, or end it"
                ) from error
            work._begin({"format": STATE_FORMAT, **state}, force=force)
            yield work

    @property
    def folder(self) -> Path:
        """The folder under way."""
        return self.destination.with_name(f"{self.destination.name}.partial")

    @property
    def files(self) -> Path:
        """What becomes the destination."""
        return self.folder / "files"

    def add_error(self, name: str, sums: ErrorSums) -> None:
        """Note the error of a chunk; the next mark keeps it."""
        for errors in (self.errors, self._new_errors):
            errors.setdefault(name, []).append(sums)

    def mark(self, file: str, done: int) -> None:
        """Bring a file to the disk, and then the word that its first `done` chunks are there."""
        sync_path(self.files / file)
        line = json.dumps({"file": file, "done": done, "errors": self._new_errors}) + "\n"
        try:
            with self._progress.open("ab") as progress:
                progress.write(line.encode())
                progress.flush()
                os.fsync(progress.fileno())
        except OSError as error:
            raise write_error(self._progress, error) from error
        self.done[file] = done
        self._new_errors = {}

    def place(self) -> None:
        """Put the complete files at the destination, in the place of what is there."""
        sync_path(self.files)
        try:
            if self.destination.exists():
                self.destination.rename(self.folder / "replaced")
            self.files.rename(self.destination)
        except OSError as error:
            raise write_error(self.destination, error) from error
        sync_path(self.destination.parent)
        shutil.rmtree(self.folder)

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.jsonl"

    def _begin(self, state: Mapping[str, Any], *, force: bool) -> None:
        begun = self._read_state()
        if begun is not None and self.files.is_dir():
            changes = _changes(begun, state)
            self._read_progress()
            if not changes:
                return
            if any(self.done.values()) and not force:
                raise ConversionError(
                    f"{self.folder}: holds a conversion that was begun otherwise: "
                    f"{'; '.join(changes)}. Finish that one as it was begun, or start over with "
                    "--force"
                )
            self.done, self.errors = {}, {}
        try:
            self._state.unlink(missing_ok=True)  # first: a state vouches for what is beside it
            self._progress.unlink(missing_ok=True)
            if self.files.is_dir():
                shutil.rmtree(self.files)
            self.files.mkdir()
        except OSError as error:
            raise write_error(self.folder, error) from error
        write_file(self._state, json.dumps(state, indent=2).encode())

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{self._state}: cannot be read: {error}; delete {self.folder} to start over"
            ) from error
        return state if isinstance(state, dict) else {}

    def _read_progress(self) -> None:
        """Take in all whole lines, and cut off a torn one, so that the next is added after them."""
        try:
            raw = self._progress.read_bytes() if self._progress.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if whole != raw:
                os.truncate(self._progress, len(whole))
        except OSError as error:
            raise write_error(self._progress, error) from error
        for text in whole.splitlines():
            line = json.loads(text)
            self.done[line["file"]] = line["done"]
            for name, pieces in line["errors"].items():
                self.errors.setdefault(name, []).extend(ErrorSums(*piece) for piece in pieces)


def _changes(begun: Mapping[str, Any], state: Mapping[str, Any], within: str = "") -> list[str]:
    """What differs, in words, one for each leaf."""
    found = []
    for key in dict.fromkeys([*begun, *state]):
        old, new = begun.get(key), json.loads(json.dumps(state.get(key)))
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{within}{key} ")
        elif old != new and within.startswith("source"):
            found.append(f"source {key} has changed since")
        elif old != new:
            found.append(f"{within}{key} was {old!r} and is {new!r}")
    return found
