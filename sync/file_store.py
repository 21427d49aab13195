"""Versions of a model as files: in a folder, or in any store that fsspec knows.

    v0000000007.safetensors   the payload: whole tensors, or encoded differences as bytes
    v0000000007.json          the manifest, with its digest; it appears last, in one step

A version is there when its manifest is. Both files are written under another name first and then
renamed; what a crash leaves behind is removed when the store is opened for writing again. A payload
is a regular safetensors file, so a full version can be read by any tool; padding between tensors is
declared in it as tensors of its own.

Everything read here is treated as hostile: names are made of version numbers alone, sizes are
checked against the files', and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, Literal

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8rl.sync.errors import CorruptTensorError, ManifestError, TransportError
from fp8rl.sync.manifest import DtypeName, Manifest, parse_manifest, told

_PARTIAL: Final = ".partial-"
_MANIFEST: Final = re.compile(r"v(\d{10})\.json")
_HEADER_LIMIT: Final = 100 * 2**20  # that of safetensors itself
_MANIFEST_LIMIT: Final = 2**30
_SAFETENSORS: Final[dict[DtypeName, str]] = {
    "float8_e4m3fn": "F8_E4M3",
    "bfloat16": "BF16",
    "float32": "F32",
}


class VersionFile(BaseModel):
    """What a manifest's file holds: the manifest, and the SHA-256 of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    manifest: dict[str, Any]


class FileStore:
    """Reads and writes versions at one URL."""

    def __init__(self, url: str) -> None:
        """Raises TransportError where fsspec knows no such store."""
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise TransportError(f"{url!r} is no store that fsspec can open: {error}") from error
        self._local = "file" in (
            [self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol
        )

    def prepare(self) -> None:
        """Make the folder, and remove what a writer that crashed left behind."""
        with self._told("be written to"):
            self._fs.makedirs(self._root, exist_ok=True)
            for name in self._names():
                if name.startswith(_PARTIAL):
                    self._fs.rm_file(self._path(name))

    def versions(self) -> list[int]:
        """Every version that is there, rising."""
        with self._told("be listed"):
            found = (_MANIFEST.fullmatch(name) for name in self._names())
            return sorted(int(match[1]) for match in found if match)

    def manifest(self, version: int) -> Manifest:
        """Read a version's manifest.

        Raises ManifestError, CorruptTensorError: it is malformed, or was changed.
        """
        name = manifest_name(version)
        with self._told(f"give {name}"):
            size = self._fs.size(self._path(name))
            if size > _MANIFEST_LIMIT:
                raise ManifestError(f"{name} has {size} bytes, which is no manifest's size")
            text = self._fs.cat_file(self._path(name))
        try:
            file = VersionFile.model_validate_json(text)
        except ValidationError as error:
            raise ManifestError(f"{name} refused at {told(error, 'file')}") from error
        if _digest(file.manifest) != file.sha256:
            raise CorruptTensorError(f"{name} was changed: its SHA-256 differs")
        manifest = parse_manifest(file.manifest)
        if manifest.version != version:
            raise ManifestError(f"{name} holds a manifest of version {manifest.version}")
        return manifest

    def payload_start(self, manifest: Manifest) -> int:
        """Where the payload begins in a version's file, after its header was held against it.

        Raises ManifestError: the file is no safetensors file of that payload.
        """
        name = payload_name(manifest.version)
        with self._told(f"give {name}"), self._fs.open(self._path(name), "rb") as file:
            size = self._fs.size(self._path(name))
            length = int.from_bytes(file.read(8), "little")
            if length > min(_HEADER_LIMIT, size - 8):
                raise ManifestError(f"{name} is no safetensors file: it begins with {length}")
            raw = file.read(length)
        try:
            header = json.loads(raw)
        except ValueError as error:
            raise ManifestError(f"{name} is no safetensors file: {error}") from error
        if header != _header(manifest) or size != 8 + length + manifest.payload_nbytes:
            raise ManifestError(
                f"{name} ({size} bytes) is not the payload of {manifest.payload_nbytes} bytes that "
                "its manifest describes; it was truncated or replaced"
            )
        return 8 + length

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """Bytes ``start`` up to ``start + nbytes`` of a payload's file."""
        with self._told(f"give {name}"), self._fs.open(self._path(name), "rb") as file:
            file.seek(start)
            data: bytes = file.read(nbytes)
        if len(data) != nbytes:
            raise TransportError(f"{name} ends after {len(data)} of {nbytes} bytes from {start}")
        return data

    def write_version(self, manifest: Manifest, payload: Iterable[bytes]) -> None:
        """Write a version: its payload, then its manifest."""
        header = json.dumps(_header(manifest), separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as safetensors aligns its data
        start = [len(header).to_bytes(8, "little"), header]
        self._write(payload_name(manifest.version), chain(start, payload))
        raw = manifest.model_dump(mode="json")
        file = VersionFile(sha256=_digest(raw), manifest=raw)
        self._write(manifest_name(manifest.version), [file.model_dump_json().encode()])

    def remove(self, version: int) -> None:
        """Remove a version: its manifest first."""
        with self._told("be written to"):
            for name in (manifest_name(version), payload_name(version)):
                if self._fs.exists(self._path(name)):
                    self._fs.rm_file(self._path(name))

    def _write(self, name: str, chunks: Iterable[bytes]) -> None:
        partial = self._path(_PARTIAL + name)
        with self._told(f"take {name}"):
            with self._fs.open(partial, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                self._settle(file)
            self._fs.mv(partial, self._path(name))

    def _settle(self, file: Any) -> None:
        """See to it that a file's bytes are on the disk before its name says so."""
        file.flush()
        if self._local:
            os.fsync(file.fileno())

    def _names(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Name the store in what the file system raises."""
        try:
            yield
        except OSError as error:
            raise TransportError(f"the store {self.url} cannot {what}: {error}") from error


def manifest_name(version: int) -> str:
    """The file of a version's manifest."""
    return f"v{version:010d}.json"


def payload_name(version: int) -> str:
    """The file of a version's payload."""
    return f"v{version:010d}.safetensors"


def _header(manifest: Manifest) -> dict[str, Any]:
    """The safetensors header of a payload: parcels in their order, and what lies between."""
    sent = sorted(
        (record for record in manifest.tensors if record.parcel),
        key=lambda record: record.parcel.offset if record.parcel else 0,
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "version": str(manifest.version)}}
    end = 0
    for record in sent:
        assert record.parcel is not None
        start, nbytes = record.parcel.offset, record.parcel.nbytes
        _pad(header, end, start)
        end = start + nbytes
        whole = record.parcel.encoding == "whole"
        header[record.name if whole else f"{record.name}.delta"] = {
            "dtype": _SAFETENSORS[record.dtype] if whole else "U8",
            "shape": list(record.shape) if whole else [nbytes],
            "data_offsets": [start, end],
        }
    _pad(header, end, manifest.payload_nbytes)
    return header


def _pad(header: dict[str, Any], start: int, stop: int) -> None:
    if stop > start:
        entry = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        header[f"padding.{start}"] = entry


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
