"""The trainer's side of an update: quantize at the source, publish, and know that it arrived.

One weight goes one way: source (Hugging Face name) -> plan -> blockwise FP8, written straight into
the segment, with its digest -> the engine's receiver. Only when every tensor lies in the segment
does the engine hear of the update, so a NaN in a weight or a source that breaks leaves the engine
as it was. KV scales go with the weights, or follow them: measured in the engine on the weights just
applied, they are sent in the same update. The control calls are the four of vLLM's
``VLLMWeightSyncClient``; any object that has them can be the client.

Where the trainer is sharded, every rank calls ``publish`` (iterating the source is a collective)
and only the rank that holds a client writes and sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from fp8rl.quant import FP32Source, KVScaleError, KVScales, QuantPlan
from fp8rl.sync.errors import SourceError
from fp8rl.sync.manifest import KVProvenance, Manifest
from fp8rl.sync.segment_writer import Records, SegmentWriter, refuse_missing
from fp8rl.sync.source import WeightSource


@runtime_checkable
class SyncClient(Protocol):
    """The engine's control plane: the four methods of vLLM's ``VLLMWeightSyncClient``."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell every worker where the segment lies."""

    def start_weight_update(self) -> None:
        """Stop serving; an update begins."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Apply and prove; raises what the engine found wrong."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit the version and serve again."""


@dataclass(frozen=True)
class SyncReport:
    """One publish in figures."""

    version: int
    tensors: int
    nbytes: int  # bytes written for the engine, KV scales included
    bf16_nbytes: int  # bytes that the same weights take in BF16
    quantize_seconds: float  # gather, quantize and write into the segment
    engine_seconds: float  # the engine's transaction: copy, load, read back, commit
    kv_seconds: float = 0.0  # measuring KV scales in the midst of it, where they follow
    kv_scales: KVScales | None = None  # those published


class Publisher:
    """Publishes versions of one model to one engine; close it (or use ``with``) when done."""

    def __init__(
        self,
        plan: QuantPlan,
        client: SyncClient | None,
        *,
        kv_layers: int = 0,
        fp32_as: FP32Source | None = None,
    ) -> None:
        """Lay out the segment and introduce it to the engine.

        Args:
            plan: which tensors are quantized; its engine tensors are what is sent.
            client: the engine, or None on trainer ranks that only take part in collectives.
            kv_layers: attention layers with an FP8 cache, for which scales will be sent.
            fp32_as: what fp32 weights of the source stand for, as in `quantize_blockwise`; they
                are refused without it.
        """
        self._client = client
        self._writer: SegmentWriter | None = None
        if client is not None:
            self._writer = SegmentWriter(plan, kv_layers, fp32_as)
            segment = self._writer.segment
            client.init_weight_transfer_engine({"path": segment.path, "nbytes": segment.nbytes})

    def __enter__(self) -> Publisher:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the segment."""
        self.close()

    def close(self) -> None:
        """Give the shared memory back."""
        if self._writer is not None:
            self._writer.segment.close()

    def publish(
        self,
        source: WeightSource,
        *,
        version: int,
        kv_scales: KVScales | Callable[[], KVScales] | None,
    ) -> SyncReport | None:
        """Send one version; returns when the engine has proven and committed it.

        Args:
            source: the weights of this version; iterated once, in lockstep over trainer ranks.
            version: higher than any committed before.
            kv_scales: measured on this version; None for an engine with a BF16 cache. A callable is
                called on the rank with the client, once the engine has applied and proven the
                weights and before it commits them: it measures through the engine.

        Returns:
            Figures of the update, or None on a rank without a client.

        Raises:
            NonFiniteWeightError: a weight holds NaN or Inf; the engine was not touched.
            SourceError: the source lacks, repeats or misshapes a tensor, KV scales among them.
            KVScaleError: the scales were measured on another version.
            EngineError and others: whatever the client or the callable raises; the engine then
                serves nothing until the next good publish.

        Whatever is found wrong before the engine hears of the update leaves it as it was.
        """
        began = time.perf_counter()
        records: Records = {}
        bf16_nbytes = 0
        for name, tensor in source:
            if self._writer is not None:
                bf16_nbytes += 2 * tensor.numel()
                self._writer.write_weight(name, tensor, records)
        if self._client is None or self._writer is None:
            return None
        refuse_missing(version, self._writer.weights, records)
        if not callable(kv_scales):
            _write_scales(self._writer, kv_scales, version, records)
        elif not self._writer.scales:
            raise SourceError(f"version {version}: KV scales of no layer; was kv_layers set?")
        written = time.perf_counter()
        published, kv_seconds = _transact(self._client, self._writer, version, kv_scales, records)
        engine_seconds = time.perf_counter() - written - kv_seconds
        return SyncReport(
            version=version,
            tensors=len(records),
            nbytes=sum(record.nbytes for record in records.values()),
            bf16_nbytes=bf16_nbytes,
            quantize_seconds=written - began,
            engine_seconds=engine_seconds,
            kv_seconds=kv_seconds,
            kv_scales=published,
        )


def _transact(
    client: SyncClient,
    writer: SegmentWriter,
    version: int,
    kv_scales: KVScales | Callable[[], KVScales] | None,
    records: Records,
) -> tuple[KVScales | None, float]:
    """Carry out the update; returns the scales that went with it and the seconds to measure them.

    ``records`` are the tensors of the first manifest; those of a second one are added to them.
    """
    seconds = 0.0
    client.start_weight_update()
    if callable(kv_scales):
        _send(client, version, records, "follow")
        began = time.perf_counter()
        kv_scales = kv_scales()
        seconds = time.perf_counter() - began
        scales: Records = {}
        _write_scales(writer, kv_scales, version, scales)
        _send(client, version, scales, _provenance(kv_scales))
        records |= scales
    else:
        _send(client, version, records, _provenance(kv_scales))
    client.finish_weight_update(str(version))
    return kv_scales, seconds


def _write_scales(
    writer: SegmentWriter, scales: KVScales | None, version: int, records: Records
) -> None:
    """Write the scales of every layer; refused where one is missing or of another version."""
    if scales is not None:
        if scales.version != version:
            raise KVScaleError(
                f"version {version} is published with KV scales that were measured on version "
                f"{scales.version}; measure them on the weights that are sent"
            )
        writer.write_scales(scales, records)
    refuse_missing(version, writer.scales, records)


def _provenance(scales: KVScales | None) -> KVProvenance | None:
    if scales is None:
        return None
    return KVProvenance(version=scales.version, observer=scales.observer, tokens=scales.tokens)


def _send(
    client: SyncClient,
    version: int,
    records: Records,
    kv_scales: KVProvenance | Literal["follow"] | None,
) -> None:
    """Have the engine apply and prove one manifest."""
    manifest = Manifest(version=version, tensors=tuple(records.values()), kv_scales=kv_scales)
    client.update_weights({"manifest": manifest.model_dump(mode="json")})
