"""Checkpoints that are whole or absent: safetensors of each rank, and a manifest.

    checkpoints/step-00000040/rank-0.safetensors, rank-1.safetensors, ..., manifest.json

All files are written into a hidden folder beside, synced to disk, and the folder is renamed into
place last, so that a kill at any moment leaves the old checkpoints or the new one. The manifest
has the SHA-256 of each file and of itself; ``load`` checks them. A broken checkpoint is an error,
never a quiet step back to an older one: which state to go on from is the user's decision.

Nothing is pickled. Tensors that differ between ranks (weights, optimizer, RNG states as uint8)
are each rank's ``tensors``; what is one for the run is ``extra``, plain JSON. Resharding to
another number of ranks is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8rl.errors import CheckpointError
from fp8rl.run_dir import sync_folder, write_file

KEPT = 2  # checkpoints; the older one is there for when the newer is found broken
MANIFEST = "manifest.json"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """One rank's part of a checkpoint: its tensors (on the CPU) and the run's ``extra``."""

    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any]

    def require(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks some of a run's state.

        Raises:
            CheckpointError: it does, as one written by an older fp8rl; the names are told.
        """
        if missing := sorted(set(names) - self.tensors.keys()):
            raise CheckpointError(
                f"the checkpoint of step {self.step} has no {', '.join(missing)}: an older fp8rl "
                "wrote it; go on with that version, or start the run anew in another run_dir"
            )


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    world_size: int,
    extra: Mapping[str, Any],
    barrier: Callable[[], None],
) -> Path:
    """Write the checkpoint of ``step``; every rank calls this, with the same step.

    A step has one state, so a second save of a step that is there already writes nothing.

    Args:
        directory: the folder of checkpoints, on a file system that all ranks share.
        step: the last step that the state includes.
        tensors: this rank's, any dtype and device.
        rank: this process's number.
        world_size: how many ranks there are.
        extra: JSON; rank 0's is the one kept.
        barrier: returns when every rank has called it.

    Returns:
        The checkpoint's folder, complete on all ranks.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".step-{step:08d}.partial"
    if final.exists():
        barrier()
        return final
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir()
    barrier()
    _write_rank(partial, rank, tensors)
    barrier()
    if rank == 0:
        _write_manifest(partial, step, world_size, extra)
        partial.rename(final)
        sync_folder(directory)
        for old in _folders(directory)[:-KEPT]:
            shutil.rmtree(old)
    barrier()
    return final


def latest(directory: Path) -> Path | None:
    """The folder of the newest checkpoint, unread; None where there is none."""
    folders = _folders(directory)
    return folders[-1] if folders else None


def load(folder: Path, *, rank: int, world_size: int) -> Checkpoint:
    """Read and verify one rank's part.

    Raises:
        CheckpointError: a file is missing or its digest is wrong (the message names it, and the
            older checkpoint that is whole), or the checkpoint is of another number of ranks.
    """
    try:
        manifest = _read_manifest(folder)
        if manifest["world_size"] != world_size:
            raise CheckpointError(
                f"{folder}: was written by {manifest['world_size']} ranks, this run has "
                f"{world_size}; resume with the same tensor and pipeline parallelism"
            )
        path = folder / _rank_file(rank)
        _verify(path, manifest["files"][path.name])
        return Checkpoint(manifest["step"], load_file(path), manifest["extra"])
    except (_BrokenError, SafetensorError) as error:
        raise CheckpointError(f"{error}. {_way_out(folder)}") from error


class _BrokenError(Exception):
    """What is wrong with a file; ``load`` adds the way out."""


def _write_rank(partial: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """This rank's tensors, and their digest beside them for rank 0 to collect."""
    path = partial / _rank_file(rank)
    # copies: safetensors refuses two names of one buffer, such as tied weights
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(own, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    write_file(path.with_suffix(".sha256"), _sha256(path).encode())


def _write_manifest(partial: Path, step: int, world_size: int, extra: Mapping[str, Any]) -> None:
    files = {}
    for rank in range(world_size):
        digest = (partial / _rank_file(rank)).with_suffix(".sha256")
        files[_rank_file(rank)] = digest.read_text()
        digest.unlink()
    plain = json.loads(json.dumps(dict(extra)))  # as it will be read back
    manifest = {"step": step, "world_size": world_size, "files": files, "extra": plain}
    manifest["sha256"] = _json_digest(manifest)
    write_file(partial / MANIFEST, json.dumps(manifest, indent=2).encode())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _BrokenError(f"{path}: is missing") from error
    except ValueError as error:
        raise _BrokenError(f"{path}: is not JSON ({error})") from error
    digest = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if digest is None or digest != _json_digest(manifest):
        raise _BrokenError(f"{path}: its contents do not match its own SHA-256")
    return manifest  # type: ignore[no-any-return]


def _verify(path: Path, expected: str) -> None:
    if not path.is_file():
        raise _BrokenError(f"{path}: is missing")
    found = _sha256(path)
    if found != expected:
        raise _BrokenError(
            f"{path}: is corrupt or truncated (SHA-256 {found[:12]}..., expected "
            f"{expected[:12]}...; {path.stat().st_size} bytes)"
        )


def _way_out(folder: Path) -> str:
    """What to do about a broken checkpoint."""
    for older in reversed(_folders(folder.parent)):
        if older.name < folder.name and _is_whole(older):
            return f"{older.name} is whole: delete {folder} to resume from that one"
    return f"No older checkpoint is whole: start a new run, or restore {folder} from a copy"


def _is_whole(folder: Path) -> bool:
    try:
        for name, digest in _read_manifest(folder)["files"].items():
            _verify(folder / name, digest)
    except _BrokenError:
        return False
    return True


def _folders(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first (hidden folders are interrupted saves)."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir())


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _json_digest(value: Mapping[str, Any]) -> str:
    """Of the canonical text, so that it does not depend on how the file is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
