"""Brings versions from a store to the engine beside it, and keeps it up to date.

    newest version -> is its base what the engine holds? else its base first, ... else a full one

The follower is the engine's publisher: it speaks to the engine through the same four calls, and the
engine proves every version as any other. What it cannot bring is an error, and the engine goes on
with what it holds.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from fp8rl.sync.engines import SyncClient
from fp8rl.sync.errors import ManifestError
from fp8rl.sync.file_store import FileStore
from fp8rl.sync.manifest import Base, Manifest, state_digest
from fp8rl.sync.transport import STAGE_BYTES, FilesIntroduction, Stage


class FileFollower:
    """Follows one store for one engine."""

    def __init__(self, url: str, engine: SyncClient) -> None:
        """Introduce the store to the engine; raises what the engine answers."""
        self._store = FileStore(url)
        self._engine = engine
        self._publisher = uuid.uuid4().hex
        self._held: Base | None = None
        transport = FilesIntroduction(url=url).model_dump()
        info = {"publisher": self._publisher, "transport": transport, "mirror": True}
        engine.init_weight_transfer_engine(info)

    def step(self) -> int | None:
        """Bring the engine to the newest version; returns it, or None where nothing is newer.

        Raises:
            ManifestError, CorruptTensorError, TransportError: the store holds no way to it.
            Whatever the engine raises; it then holds the version before.
        """
        versions = self._store.versions()
        if not versions or (self._held is not None and versions[-1] <= self._held.version):
            return None
        for manifest in self._way_to(versions[-1]):
            self._bring(manifest)
        return versions[-1]

    def follow(self, *, poll_seconds: float, until: Callable[[], bool]) -> None:
        """Step whenever something new is there, until ``until()``."""
        while not until():
            if self.step() is None:
                time.sleep(poll_seconds)

    def _way_to(self, version: int) -> list[Manifest]:
        """The manifests to apply, in order: from a full one, or from what the engine holds."""
        way = [self._store.manifest(version)]
        while (base := way[0].base) is not None and base != self._held:
            before = self._store.manifest(base.version)
            if _base_of(before) != base:
                raise ManifestError(
                    f"version {way[0].version} builds on version {base.version} with other weights "
                    f"than the store {self._store.url} holds; publish a full version"
                )
            way.insert(0, before)
        return way

    def _bring(self, manifest: Manifest) -> None:
        start = self._store.payload_start(manifest)
        self._engine.start_weight_update()
        try:
            for at in range(0, manifest.payload_nbytes, STAGE_BYTES):
                nbytes = min(STAGE_BYTES, manifest.payload_nbytes - at)
                stage = Stage(
                    start=at,
                    nbytes=nbytes,
                    total=manifest.payload_nbytes,
                    at=start + at,
                    version=manifest.version,
                )
                self._update({"stage": stage.model_dump()})
            self._update({"manifest": manifest.model_dump(mode="json")})
            self._engine.finish_weight_update(str(manifest.version))
        except (ValueError, RuntimeError):
            self._held = None  # the engine may have been restarted: begin with a full version
            raise
        self._held = _base_of(manifest)

    def _update(self, content: dict[str, Any]) -> None:
        self._engine.update_weights({"publisher": self._publisher, **content})


def _base_of(manifest: Manifest) -> Base:
    return Base(version=manifest.version, digest=state_digest(manifest.tensors))
