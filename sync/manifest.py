"""The manifest: what one update holds, said before its first byte is applied.

A manifest names the version and every tensor (dtype, shape, place in the segment, digest), the
KV-cache scales among them, and says on which version those were measured. It is JSON, and it is
treated as hostile: names, sizes and offsets are checked before anything is read. What an engine
takes is asked of the engine itself (``engine_state.py``), and held against it in ``admission.py``.

Left out until deltas exist: ``base_version`` other than None.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic import model_validator as check

from fp8rl.quant import QKV
from fp8rl.sync.errors import ManifestError

ALIGNMENT = 64  # bytes; every tensor starts on a cache line, so that any dtype can view it

DtypeName = Literal["float8_e4m3fn", "bfloat16", "float32"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SCALE_SUFFIXES = tuple(f".{x}_scale" for x in QKV)


class TensorRecord(BaseModel):
    """One tensor of an update and where its bytes lie in the segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)
    dtype: DtypeName
    shape: tuple[NonNegativeInt, ...] = Field(max_length=4)
    offset: NonNegativeInt
    nbytes: NonNegativeInt
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    @check(mode="after")
    def _size_fits_shape(self) -> Self:
        expected = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        if self.nbytes != expected:
            raise ValueError(
                f"{self.name}: {self.nbytes} bytes, but {self.dtype} {list(self.shape)} "
                f"takes {expected}"
            )
        if self.offset % ALIGNMENT:
            raise ValueError(f"{self.name}: offset {self.offset} is not a multiple of {ALIGNMENT}")
        return self


class KVProvenance(BaseModel):
    """Where the KV scales of an update come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: NonNegativeInt
    observer: str
    tokens: PositiveInt


class Manifest(BaseModel):
    """One update: its version, and its tensors in the order in which they are loaded.

    kv_scales: where the scales among its tensors come from; "follow" where they are still to be
    measured, on these weights; None for an engine whose cache takes none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    version: NonNegativeInt
    base_version: None = None
    tensors: tuple[TensorRecord, ...] = Field(min_length=1)
    kv_scales: KVProvenance | Literal["follow"] | None = None

    @check(mode="after")
    def _tensors_are_distinct(self) -> Self:
        names = [record.name for record in self.tensors]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"tensors named twice: {', '.join(twice[:5])}")
        end, last = 0, "the segment's start"
        for record in sorted(self.tensors, key=lambda record: (record.offset, record.nbytes)):
            if record.offset < end:
                raise ValueError(f"{record.name} overlaps {last} in the segment")
            end, last = record.offset + record.nbytes, record.name
        return self


def parse_manifest(raw: Any) -> Manifest:
    """Validate a manifest that came over a wire.

    Raises:
        ManifestError: a field is missing, unknown, of the wrong type or out of range; offsets
            overlap; a size does not follow from dtype and shape.
    """
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestError(
            f"manifest refused at {where}: {first['msg']} ({error.error_count()} problem(s) in all)"
        ) from error


def is_kv_scale(name: str) -> bool:
    """Whether a tensor's name is that of a KV-cache scale."""
    return name.endswith(_SCALE_SUFFIXES)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def align(offset: int) -> int:
    """The next multiple of ``ALIGNMENT`` at or after ``offset``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
