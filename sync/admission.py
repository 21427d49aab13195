"""What an engine lets in, decided before the first byte is applied.

An update is one manifest or two:

    weights + scales                                  measured by the trainer
    weights with ``kv_scales: "follow"``, then scales   measured on the weights just applied

Either way every tensor that the engine takes must be named, with the right dtype and shape, and
nothing else; the version must be newer than the one committed, and the scales measured on that very
version. Whether a scale is there is judged by the names that were sent, never by a value: a
measured 1.0 is a scale, an unsent one is not. Of what comes in every byte is checked by digest, and
every value must be finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fp8rl.quant import EngineTensor, KVScaleError
from fp8rl.sync.errors import CorruptTensorError, ManifestError
from fp8rl.sync.manifest import DTYPES, KVProvenance, Manifest, TensorRecord, digest, is_kv_scale
from fp8rl.sync.segment import Segment

NAMES_SHOWN = 12  # the scales of four layers


def admit_weights(
    manifest: Manifest, expected: Mapping[str, EngineTensor], committed: int | None
) -> None:
    """Let in the first manifest of an update.

    Args:
        manifest: what is to be applied.
        expected: every tensor that the engine takes, KV scales included, by name.
        committed: the version that the engine proved last; None before the first.

    Raises:
        ManifestError: its version is not newer; a tensor is missing, unknown or of another dtype or
            shape; KV scales stand alone.
        KVScaleError: KV scales of another version, without provenance, or for no FP8 cache.
    """
    version, scales = manifest.version, list(filter(is_kv_scale, expected))
    if all(is_kv_scale(record.name) for record in manifest.tensors):
        raise ManifestError(
            f"version {version}: KV scales came alone, but no weights of that version were applied "
            "before them; send the weights first, in the same update"
        )
    if committed is not None and version <= committed:
        raise ManifestError(
            f"version {version} is not newer than {committed}, which the engine holds; publish a "
            "higher version"
        )
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


def copy_verified(manifest: Manifest, segment: Segment) -> dict[str, torch.Tensor]:
    """Copy every tensor of a manifest out of the segment and check the copy.

    Raises:
        CorruptTensorError: its bytes are not those of its digest, or it holds NaN or Inf.
        KVScaleError: a scale is not above 0. SegmentError: a place lies outside the segment.
    """
    tensors = {}
    for record in manifest.tensors:
        raw = segment.view(record.offset, record.nbytes).clone()
        if digest(raw) != record.digest:
            raise CorruptTensorError(
                f"{record.name}: the bytes received are not those sent (SHA-256 differs)"
            )
        tensor = raw.view(DTYPES[record.dtype]).reshape(record.shape)
        if not torch.isfinite(tensor.float()).all():
            raise CorruptTensorError(f"{record.name}: holds NaN or Inf")
        if is_kv_scale(record.name) and not bool(tensor > 0):
            raise KVScaleError(f"{record.name}: is {float(tensor)}, must be above 0")
        tensors[record.name] = tensor
    return tensors


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
