"""One version of the policy as named byte tensors, which is what veRL's own plumbing carries.

    trainer rank    (name, full tensor) of veRL's engine -> quantized by the plan, fingerprinted
                    -> "fp8rl/stage/..." uint8, "fp8rl/stage/..." uint8, ..., "fp8rl/manifest" JSON
    vLLM worker     `proven_updates.py`

Payload, stages and manifest are those of `fp8rl.sync`; only the envelope is veRL's. A NaN, a tensor
that is missing or has another shape, are errors on the trainer's side, before the manifest.

Versions are veRL's global steps; where veRL repeats a step, or names none, the next number.
Leaves out: deltas, and a mirror in the engine. veRL ends a run in which an update fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.integrations.verl.settings import SyncSettings
from fp8rl.quant import KVScaleError, KVScales
from fp8rl.sync import SourceError
from fp8rl.sync.encode import encode
from fp8rl.sync.manifest import Manifest
from fp8rl.sync.source import HEAD, hugging_face_name, without_head
from fp8rl.sync.transport import STAGE_BYTES, Stage
from fp8rl.sync.update import check_scales, provenance_of
from fp8rl.sync.update_writer import Layout, UpdateWriter, refuse_missing

MANIFEST: Final = "fp8rl/manifest"
STAGE: Final = "fp8rl/stage/"

Named = tuple[str, Tensor]
MeasureKV = Callable[[int], KVScales]

_measures: list[MeasureKV] = []


def use_kv_scales(measure: MeasureKV | None) -> None:
    """Say how the KV scales of a version are measured; None: not at all.

    To be called in every trainer process, for instance by the module that veRL imports there as
    `actor_rollout_ref.model.external_lib`. veRL 0.9.1 shows a checkpoint engine neither the model
    nor its data, so what is measured on is up to `measure`, which is called with the version on
    every rank that sends, before its weights are.
    """
    _measures[:] = [] if measure is None else [measure]


class Sender:
    """Makes versions, one after the other, on one trainer rank."""

    def __init__(self, settings: SyncSettings) -> None:
        plan = settings.plan()
        self._dtypes = {entry.name: entry.dtype for entry in plan.entries}
        self._layout = Layout(plan, settings.kv_layers)
        self._how = (settings.fp32_as, plan.scale_format)
        self._last = -1

    @property
    def payload_nbytes(self) -> int:
        """Bytes of every version."""
        return self._layout.payload_nbytes(scales=bool(self._layout.scales))

    def pieces(
        self, weights: Iterable[Named], step: int | None
    ) -> Iterator[UInt8[Tensor, " n"] | Manifest]:
        """The payload in order, piece by piece, and then the manifest.

        Args:
            weights: veRL's (Hugging Face name, full tensor); run through once.
            step: veRL's global step.

        Raises:
            SourceError: a tensor is missing, unknown, comes twice or has another shape.
            NonFiniteWeightError: a weight holds NaN or Inf.
            KVScaleError: an FP8 cache and no KV scales of this version.
        """
        version = max(self._last + 1, step or 0)
        scales = self._scales(version)
        written: list[Tensor] = []
        # what the writer hands over is a view of memory that it will not touch again
        writer = UpdateWriter(self._layout, written.append, None, delta=False)
        for name, tensor in self._named(weights):
            if name not in self._dtypes:
                raise SourceError(f"{name}: veRL yields it, and {HEAD!r} aside the model has none")
            writer.weight(name, encode(name, tensor, self._dtypes[name], *self._how))
            yield from written
            written.clear()
        refuse_missing(version, self._layout.weights, writer.records)
        if scales is not None:
            writer.scales(scales)
            yield from written
        self._last = version
        yield Manifest(
            version=version,
            payload_nbytes=writer.nbytes,
            tensors=tuple(writer.records.values()),
            kv_scales=provenance_of(scales),
        )

    def stages(
        self, weights: Iterable[Named], step: int | None, stage_bytes: int = STAGE_BYTES
    ) -> Iterator[Named]:
        """The same as named tensors of at most `stage_bytes` each; errors as `pieces`."""
        start, filled = 0, torch.empty(0, dtype=torch.uint8)
        room = filled
        for piece in self.pieces(weights, step):
            if isinstance(piece, Manifest):
                assert not len(filled)  # the pieces are the payload, which was cut to its end
                yield manifest_message(piece)
                continue
            while len(piece):
                if not len(filled):
                    room = torch.empty(
                        min(stage_bytes, self.payload_nbytes - start), dtype=torch.uint8
                    )
                n = min(len(piece), len(room) - len(filled))
                room[len(filled) : len(filled) + n] = piece[:n]
                filled, piece = room[: len(filled) + n], piece[n:]
                if len(filled) == len(room):
                    stage = Stage(start=start, nbytes=len(room), total=self.payload_nbytes)
                    yield stage_message(stage, room)
                    start, filled = start + len(room), filled[:0]

    def _named(self, weights: Iterable[Named]) -> Iterator[Named]:
        named = ((hugging_face_name(name), tensor) for name, tensor in weights)
        return named if HEAD in self._dtypes else without_head(named)

    def _scales(self, version: int) -> KVScales | None:
        if not self._layout.scales:
            return None
        if not _measures:
            raise KVScaleError(
                f"version {version}: kv_cache_dtype=fp8 needs KV scales of every version, and "
                "nothing in veRL measures them; say how with "
                "fp8rl.integrations.verl.wire.use_kv_scales, or leave the cache BF16"
            )
        scales = _measures[0](version)
        check_scales(scales, version, self._layout)
        return scales


def stage_message(stage: Stage, data: UInt8[Tensor, " n"]) -> Named:
    """A stage as veRL carries it: its place in the name, for names must differ."""
    return f"{STAGE}{stage.model_dump_json()}", data


def manifest_message(manifest: Manifest) -> Named:
    """A manifest as veRL carries it."""
    text = manifest.model_dump_json().encode()
    return MANIFEST, torch.frombuffer(bytearray(text), dtype=torch.uint8)


def manifest_of(data: UInt8[Tensor, " n"]) -> object:
    """The manifest's JSON, not yet checked (`parse_manifest`)."""
    found: object = json.loads(bytes(data.cpu().numpy().data))
    return found
