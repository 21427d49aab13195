"""The transport by files, for trainers and engines that share no network.

    trainer   Publisher -> Files      writes versions into a store (``file_store.py``)
    engine    FileFollower            finds them and brings them to the engine beside it

``Files`` is transport and client in one: to publish is to write. When ``publish`` returns the
version is complete in the store; that an engine took it is proven, and said, on the engine's side.
Scales cannot follow, since nobody measures between the two: measure them in the trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import IO, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.quant import KVScaleError
from fp8rl.sync.errors import ManifestError, TransportError
from fp8rl.sync.file_store import FileStore, payload_name
from fp8rl.sync.manifest import Manifest, parse_manifest
from fp8rl.sync.transport import STAGE_BYTES, FilesIntroduction, Outbox, Send, Stage, Start


class Files:
    """Publishes into a store: ``Publisher(plan, files, transport=files)``.

    The versions since the last full one are kept, and those since the one before it; what is older
    is removed.
    """

    def __init__(self, url: str) -> None:
        """``url``: a folder, or whatever fsspec opens. Raises TransportError."""
        self._store = FileStore(url)
        self._outbox = FilesOutbox()
        self._manifest: Manifest | None = None
        self._last_full: int | None = None  # that this trainer wrote

    def open(self, largest_payload: int, engines: int) -> Outbox:
        """The transport's side; TransportError for several engines: they follow by themselves."""
        if engines != 1:
            raise TransportError(
                f"files are written once, for any number of engines; found {engines} clients"
            )
        return self._outbox

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Prepare the store."""
        self._store.prepare()

    def start_weight_update(self) -> None:
        """Begin a version."""
        self._manifest = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take note of the manifest; raises KVScaleError where scales are to follow."""
        if "manifest" in update_info:
            manifest = parse_manifest(update_info["manifest"])
            if manifest.kv_scales == "follow":
                raise KVScaleError(
                    "KV scales cannot follow through files: measure them in the trainer "
                    "and publish them with the weights"
                )
            self._manifest = manifest
        elif "abandon" in update_info:
            self._manifest = None

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Write the version; raises TransportError, and the store is as before."""
        if self._manifest is None:
            raise ManifestError("finish_weight_update came before a complete update")
        versions = self._store.versions()
        if versions and self._manifest.version <= versions[-1]:
            raise ManifestError(
                f"version {self._manifest.version} is not newer than {versions[-1]}, which the "
                f"store {self._store.url} holds; publish a higher version"
            )
        self._store.write_version(self._manifest, self._outbox.chunks())
        if self._manifest.base is None:
            for version in versions:
                if self._last_full is not None and version < self._last_full:
                    self._store.remove(version)
            self._last_full = self._manifest.version


class FilesOutbox:
    """Collects a payload in a temporary file, until its manifest says what it is."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._send: Send | None = None
        self._nbytes = self._written = 0

    def introductions(self) -> list[dict[str, Any]]:
        """Nothing to tell but the kind; a follower introduces the store to its engine."""
        return [FilesIntroduction(url="").model_dump()]

    def connect(self, answers: Sequence[Future[None]] = ()) -> None:
        """Nobody to meet."""

    def begin(self, nbytes: int, send: Send, start: Start | None = None) -> None:
        """Begin a payload; see ``Outbox``. Its one stage is announced, and so begun, at the end."""
        self.abandon()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._send, self._nbytes = send, nbytes

    def write(self, data: UInt8[Tensor, " n"]) -> None:
        """Append bytes; TransportError where the disk is full."""
        if self._file is None:
            raise TransportError("bytes were written before a payload was begun")
        try:
            self._file.write(data.numpy().data)
        except OSError as error:
            raise TransportError(f"the payload could not be collected: {error}") from error
        self._written += len(data)

    def finish(self) -> None:
        """Announce the payload, once it is complete."""
        if self._send is None or self._written != self._nbytes:
            raise TransportError(f"{self._written} of {self._nbytes} bytes were written")
        stage = Stage(start=0, nbytes=self._nbytes, total=self._nbytes)
        self._send({"stage": stage.model_dump()})

    def chunks(self) -> Iterator[bytes]:
        """The payload, piece by piece."""
        if self._file is None:
            raise TransportError("there is no payload")
        self._file.seek(0)
        while chunk := self._file.read(STAGE_BYTES):
            yield chunk

    def abandon(self) -> None:
        """Forget the payload."""
        if self._file is not None:
            self._file.close()
        self._file = self._send = None
        self._nbytes = self._written = 0

    def close(self) -> None:
        """Forget the payload."""
        self.abandon()


class FilesInbox:
    """An engine worker's way to the store."""

    def __init__(self, introduction: FilesIntroduction) -> None:
        """Raises TransportError where there is no such store."""
        self._store = FileStore(introduction.url)

    def fetch(self, stage: Stage, out: UInt8[Tensor, " n"]) -> None:
        """Read a stage from the file of its version."""
        if stage.version is None:
            raise TransportError("a stage of a store names no version")
        data = self._store.read(payload_name(stage.version), stage.at, stage.nbytes)
        out.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def close(self) -> None:
        """Nothing is held."""
