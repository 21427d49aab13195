"""What an engine lets in, decided before the first byte is applied.

An update is one manifest or two:

    weights + scales                                  measured by the trainer
    weights with ``kv_scales: "follow"``, then scales   measured on the weights just applied

Either way every tensor that the engine takes must be named, with the right dtype and shape, and
nothing else; the version must be newer than the one committed, and the scales measured on that very
version. Whether a scale is there is judged by the names that were sent, never by a value: a
measured 1.0 is a scale, an unsent one is not. An update that builds on a base needs an engine that
holds exactly this base. Of what comes in every tensor is checked by its fingerprint, once decoded,
and every value must be finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.quant import EngineTensor, KVScaleError
from fp8rl.sync.delta import apply_delta
from fp8rl.sync.errors import BaseMismatchError, CorruptTensorError, ManifestError
from fp8rl.sync.fingerprint import fingerprint, finite
from fp8rl.sync.manifest import (
    DTYPES,
    Base,
    KVProvenance,
    Manifest,
    Parcel,
    TensorRecord,
    is_kv_scale,
)
from fp8rl.sync.mirror import Mirror

NAMES_SHOWN = 12  # the scales of four layers


def admit_weights(
    manifest: Manifest, expected: Mapping[str, EngineTensor], held: Mirror | None
) -> None:
    """Let in the first manifest of an update.

    Args:
        manifest: what is to be applied.
        expected: every tensor that the engine takes, KV scales included, by name.
        held: the version that the engine proved last; None before the first.

    Raises:
        ManifestError: its version is not newer; a tensor is missing, unknown or of another dtype or
            shape; KV scales stand alone.
        BaseMismatchError: it builds on a version that the engine does not hold.
        KVScaleError: KV scales of another version, without provenance, or for no FP8 cache.
    """
    version, scales = manifest.version, list(filter(is_kv_scale, expected))
    if all(is_kv_scale(record.name) for record in manifest.tensors):
        raise ManifestError(
            f"version {version}: KV scales came alone, but no weights of that version were applied "
            "before them; send the weights first, in the same update"
        )
    if held is not None and version <= held.base.version:
        raise ManifestError(
            f"version {version} is not newer than {held.base.version}, which the engine holds; "
            "publish a higher version"
        )
    _check_base(version, manifest.base, held)
    follow = manifest.kv_scales == "follow"
    if follow and not scales:
        raise KVScaleError(
            f"version {version}: KV scales are to follow, but this engine's KV cache is not FP8 "
            "and takes none"
        )
    _compare(manifest, {n: t for n, t in expected.items() if not (follow and is_kv_scale(n))})
    if scales and not follow:
        _check_provenance(manifest)


def admit_scales(manifest: Manifest, expected: Mapping[str, EngineTensor], awaited: int) -> None:
    """Let in the second manifest of an update: the KV scales of version ``awaited``, all of them.

    Raises:
        ManifestError: it is of another version; a scale is missing, or something else is in it.
        KVScaleError: the scales were measured on another version, or have no provenance.
    """
    if manifest.version != awaited:
        raise ManifestError(
            f"KV scales of version {awaited} are to follow, found a manifest of version "
            f"{manifest.version}"
        )
    _compare(manifest, {n: t for n, t in expected.items() if is_kv_scale(n)})
    _check_provenance(manifest)


def unpack(
    manifest: Manifest, payload: UInt8[Tensor, " n"], held: Mirror | None
) -> dict[str, Tensor]:
    """Make every tensor that a manifest changes from the payload's bytes, and check it.

    Whole tensors are views of the payload; deltas are applied to copies of what is held.

    Raises:
        CorruptTensorError: its bytes are not those of its digest, or it holds NaN or Inf; or one
            that should be unchanged is another. DeltaError: a delta cannot be decoded.
        KVScaleError: a scale is not above 0.
    """
    tensors = {}
    for record in manifest.tensors:
        if record.parcel is None:
            _check_unchanged(record, held)
            continue
        raw = _decoded(record, record.parcel, payload, held)
        tensor = raw.view(DTYPES[record.dtype]).reshape(record.shape)
        if fingerprint(tensor) != record.digest:
            raise CorruptTensorError(
                f"{record.name}: the bytes received are not those sent (fingerprints differ)"
            )
        if not finite(tensor):
            raise CorruptTensorError(f"{record.name}: holds NaN or Inf")
        if is_kv_scale(record.name) and not bool(tensor > 0):
            raise KVScaleError(f"{record.name}: is {float(tensor)}, must be above 0")
        tensors[record.name] = tensor
    return tensors


def _decoded(
    record: TensorRecord, parcel: Parcel, payload: Tensor, held: Mirror | None
) -> UInt8[Tensor, " n"]:
    sent = payload[parcel.offset : parcel.offset + parcel.nbytes]
    if parcel.encoding == "whole":
        return sent
    assert held is not None  # admitted: a delta comes only with its base
    return apply_delta(as_bytes(held.weights[record.name]), sent)


def _check_unchanged(record: TensorRecord, held: Mirror | None) -> None:
    found = held.digests[record.name] if held is not None else None
    if found != record.digest:
        raise CorruptTensorError(
            f"{record.name}: comes unchanged with fingerprint {record.digest}, but the engine "
            f"holds {found}"
        )


def as_bytes(tensor: Tensor) -> UInt8[Tensor, " n"]:
    """A contiguous tensor's bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def shown(names: Iterable[str], separator: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return separator.join(names[:NAMES_SHOWN]) + more


def _compare(manifest: Manifest, expected: Mapping[str, EngineTensor]) -> None:
    sent = {record.name: record for record in manifest.tensors}
    missing = [name for name in expected if name not in sent]
    extra = [name for name in sent if name not in expected]
    wrong = [
        f"{name}: sent {record.dtype} {list(record.shape)}, "
        f"engine takes {expected[name].dtype} {list(expected[name].shape)}"
        for name, record in sent.items()
        if name in expected and not _fits(record, expected[name])
    ]
    for what, names in (("missing", missing), ("not of this model", extra), ("unfit", wrong)):
        if names:
            raise ManifestError(
                f"version {manifest.version}: {len(names)} {what}: {shown(names, '; ')}"
            )


def _fits(record: TensorRecord, expected: EngineTensor) -> bool:
    return DTYPES[record.dtype] == expected.dtype and record.shape == expected.shape


def _check_base(version: int, base: Base | None, held: Mirror | None) -> None:
    """A delta needs the very bytes that it was taken against."""
    if base is None or (held is not None and held.kept and held.base == base):
        return
    if held is None:
        found = "holds no version yet"
    elif not held.kept:
        found = "keeps no mirror of its weights"
    else:
        found = f"holds version {held.base.version} ({held.base.digest[:12]})"
    raise BaseMismatchError(
        f"version {version} builds on version {base.version} ({base.digest[:12]}), but the engine "
        f"{found}; send a full update"
    )


def _check_provenance(manifest: Manifest) -> None:
    """The scales must say that they were measured on the version that is sent."""
    measured = manifest.kv_scales
    if not isinstance(measured, KVProvenance):
        raise KVScaleError(f"version {manifest.version}: its KV scales have no provenance")
    if measured.version != manifest.version:
        raise KVScaleError(
            f"KV scales were measured on version {measured.version}, the weights are version "
            f"{manifest.version}; measure them on the weights that are sent"
        )
