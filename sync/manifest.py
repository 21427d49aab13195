"""The manifest: what an engine holds after an update, said before the first byte is applied.

A manifest names the version and every tensor (dtype, shape, fingerprint), the KV-cache scales among
them, and says on which version those were measured. Beside each tensor stands how it comes:

    whole   its bytes lie in the payload
    delta   an encoded difference to the same tensor of the base version lies there
    None    it is that of the base version, unchanged

The payload is what a transport brings: one run of bytes, complete before the manifest is sent. A
manifest is JSON, and it is treated as hostile: names, sizes and offsets are checked before anything
is read. What an engine takes is asked of the engine itself (``engine_state.py``), and held against
it in ``admission.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic import model_validator as check

from fp8rl.quant import QKV
from fp8rl.sync.errors import ManifestError

ALIGNMENT = 64  # bytes; every parcel starts on a cache line, so that any dtype can view it

DtypeName = Literal["float8_e4m3fn", "bfloat16", "float32"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALE_SUFFIXES = tuple(f".{x}_scale" for x in QKV)


class Parcel(BaseModel):
    """Where in the payload a tensor's bytes lie, and what they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoding: Literal["whole", "delta"] = "whole"
    offset: NonNegativeInt
    nbytes: PositiveInt


class TensorRecord(BaseModel):
    """One tensor after the update; ``digest`` is the fingerprint of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)
    dtype: DtypeName
    shape: tuple[PositiveInt, ...] = Field(max_length=4)
    digest: str = Field(pattern=r"^[0-9a-f]{16,64}$")
    parcel: Parcel | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @check(mode="after")
    def _parcel_fits_shape(self) -> Self:
        if self.parcel is None:
            return self
        found, whole = self.parcel.nbytes, self.parcel.encoding == "whole"
        if found != self.nbytes if whole else found >= self.nbytes:
            raise ValueError(
                f"{self.name}: a {self.parcel.encoding} parcel of {found} bytes, but {self.dtype} "
                f"{list(self.shape)} takes {self.nbytes}"
            )
        if whole and self.parcel.offset % ALIGNMENT:
            raise ValueError(
                f"{self.name}: offset {self.parcel.offset} is not a multiple of {ALIGNMENT}"
            )
        return self


class KVProvenance(BaseModel):
    """Where the KV scales of an update come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: NonNegativeInt
    observer: str
    tokens: PositiveInt


class Base(BaseModel):
    """The version that an update builds on, and the digest of its weights (``state_digest``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: NonNegativeInt
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """One update: its version, and its tensors in the order in which they are loaded.

    base: None where every tensor comes whole. payload_nbytes: what the transport has brought.
    kv_scales: where the scales among its tensors come from; "follow" where they are still to be
    measured, on these weights; None for an engine whose cache takes none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    version: NonNegativeInt
    base: Base | None = None
    payload_nbytes: NonNegativeInt
    tensors: tuple[TensorRecord, ...] = Field(min_length=1)
    kv_scales: KVProvenance | Literal["follow"] | None = None

    @check(mode="after")
    def _tensors_are_distinct(self) -> Self:
        names = [record.name for record in self.tensors]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"tensors named twice: {', '.join(twice[:5])}")
        return self

    @check(mode="after")
    def _parcels_lie_apart(self) -> Self:
        sent = [(record.name, record.parcel) for record in self.tensors if record.parcel]
        end, last = 0, "the payload's start"
        for name, parcel in sorted(sent, key=lambda one: (one[1].offset, one[1].nbytes)):
            if parcel.offset < end:
                raise ValueError(f"{name} overlaps {last} in the payload")
            end, last = parcel.offset + parcel.nbytes, name
        if end > self.payload_nbytes:
            raise ValueError(f"{last} ends at {end}, outside the payload of {self.payload_nbytes}")
        return self

    @check(mode="after")
    def _without_base_all_is_whole(self) -> Self:
        for record in self.tensors:
            whole = record.parcel is not None and record.parcel.encoding == "whole"
            if self.base is None and not whole:
                raise ValueError(f"{record.name} does not come whole, and no base version is named")
            if is_kv_scale(record.name) and not whole:
                raise ValueError(f"{record.name} is a KV scale, which is measured anew and whole")
        return self


def parse_manifest(raw: Any) -> Manifest:
    """Validate a manifest that came over a wire.

    Raises:
        ManifestError: a field is missing, unknown, of the wrong type or out of range; parcels
            overlap; a size does not follow from dtype and shape.
    """
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise ManifestError(f"manifest refused at {told(error, 'manifest')}") from error


def told(error: ValidationError, what: str) -> str:
    """Say where in ``what`` the first problem lies, what it is, and how many there are."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or what
    return f"{where}: {first['msg']} ({error.error_count()} problem(s) in all)"


def is_kv_scale(name: str) -> bool:
    """Whether a tensor's name is that of a KV-cache scale."""
    return name.endswith(_SCALE_SUFFIXES)


def state_digest(records: Iterable[TensorRecord]) -> str:
    """SHA-256 over name, dtype, shape and fingerprint of every weight, in order of names.

    Two engines of one digest hold the same weights. KV scales are left out: they come anew with
    every version.
    """
    held = sorted(
        [record.name, record.dtype, list(record.shape), record.digest]
        for record in records
        if not is_kv_scale(record.name)
    )
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def align(offset: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``offset``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
