"""One publish, step by step, on the rank that sends.

    send    stages: a payload with every tensor, or with what differs from the base
    apply   the manifest, and a second one where the KV scales follow
    commit  the engines serve the version

The engines hear of it when the first stage is full, so what is wrong with a small model is found
before that; with a large one they give up what they copied, and have applied nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor

from fp8rl.quant import KVScaleError, KVScales, QuantizedTensor
from fp8rl.sync.engines import Engines
from fp8rl.sync.errors import BaseMismatchError, SourceError, TransportError
from fp8rl.sync.ledger import Ledger
from fp8rl.sync.manifest import Base, KVProvenance, Manifest, state_digest
from fp8rl.sync.transport import Outbox
from fp8rl.sync.update_writer import Layout, UpdateWriter, refuse_missing

KVMeasure = Callable[[], KVScales]
Provenance = KVProvenance | Literal["follow"] | None
Stream = Iterable[tuple[str, QuantizedTensor | Tensor]]


class Update:
    """One version on its way to the engines.

    base: the version that a delta builds on; None for a full update, also once one turned out to be
    needed. records, nbytes: of all tensors sent, and of their payload. kv_seconds: spent measuring.
    """

    def __init__(
        self,
        layout: Layout,
        ledger: Ledger | None,
        engines: Engines,
        outbox: Outbox,
        version: int,
        base: Base | None,
    ) -> None:
        self._layout, self._ledger = layout, ledger
        self._engines, self._outbox, self._version = engines, outbox, version
        self.base = base
        self._started = False
        self._writer = UpdateWriter(layout, outbox.write, ledger, delta=False)
        self.kv_seconds = 0.0
        self.nbytes = 0

    @property
    def records(self) -> dict[str, Any]:
        """The records of every tensor of the version."""
        return self._writer.records

    def send(self, stream: Stream, scales: KVScales | None) -> None:
        """Have every engine copy the payload; raises what source, transport or engines raise."""
        if self.base is None:
            self._begin(self._layout.payload_nbytes(scales=scales is not None))
            self._write(stream, scales)
            self._outbox.finish()
        else:
            chunks: list[Tensor] = []
            self._writer = UpdateWriter(
                self._layout, lambda data: chunks.append(data.clone()), self._ledger, delta=True
            )
            self._write(stream, scales)
            try:
                self._carry(chunks)
            except TransportError as error:  # an engine that died in a stage took all others along
                self.abandon(str(error))
                self._started = False
                self._engines.introduce()
                self._carry(chunks)
        self.nbytes += self._writer.nbytes

    def apply(self, kv_scales: KVScales | KVMeasure | None) -> KVScales | None:
        """Have the engines apply and prove it; returns the KV scales that went with it."""
        measured = kv_scales if isinstance(kv_scales, KVScales) else None
        provenance: Provenance = "follow" if callable(kv_scales) else provenance_of(measured)
        try:
            self._send_manifest(provenance)
        except (ValueError, RuntimeError) as error:
            if self.base is None or BaseMismatchError.__name__ not in str(error):
                raise
            self._send_whole(measured)
            self._send_manifest(provenance)
        if callable(kv_scales):
            measured = self._measure(kv_scales)
        return measured

    def commit(self) -> Base:
        """Have the engines commit; returns what they hold."""
        base = Base(version=self._version, digest=state_digest(self.records.values()))
        self._engines.finish(self._version, base)
        return base

    def abandon(self, reason: str) -> None:
        """Give it up on all sides."""
        self._outbox.abandon()
        if self._started:
            self._engines.abandon(reason)

    def _write(self, stream: Stream, scales: KVScales | None) -> None:
        for name, value in stream:
            self._writer.weight(name, value)
        refuse_missing(self._version, self._layout.weights, self.records)
        if scales is not None:
            self._writer.scales(scales)
            refuse_missing(self._version, self._layout.scales, self.records)

    def _carry(self, chunks: Iterable[Tensor]) -> None:
        """Send a payload that lies in memory."""
        self._begin(self._writer.nbytes)
        for chunk in chunks:
            self._outbox.write(chunk)
        self._outbox.finish()

    def _begin(self, nbytes: int) -> None:
        self._outbox.begin(nbytes, self._announce, self._start)

    def _start(self) -> None:
        """Begin the update on all engines, unless it is begun."""
        if not self._started:
            self._started = True
            self._engines.start()

    def _announce(self, content: dict[str, Any]) -> None:
        """Send a stage or a manifest."""
        self._start()
        self._engines.update(content)

    def _send_whole(self, scales: KVScales | None) -> None:
        """Send every tensor whole after all, from the ledger, in a session of its own."""
        assert self._ledger is not None  # a delta was sent
        self.base, self._started = None, False
        self._engines.rejoin()
        self._writer = UpdateWriter(self._layout, self._outbox.write, None, delta=False)
        self._begin(self._layout.payload_nbytes(scales=scales is not None))
        self._writer.from_ledger(self._ledger)
        if scales is not None:
            self._writer.scales(scales)
        self._outbox.finish()
        self.nbytes += self._writer.nbytes

    def _measure(self, measure: KVMeasure) -> KVScales:
        began = time.perf_counter()
        scales = measure()
        self.kv_seconds = time.perf_counter() - began
        check_scales(scales, self._version, self._layout)
        writer = UpdateWriter(self._layout, self._outbox.write, None, delta=False)
        self._begin(self._layout.scales_nbytes)
        writer.scales(scales)
        self._outbox.finish()
        self._send_manifest(provenance_of(scales), writer)
        self._writer.records |= writer.records
        self.nbytes += writer.nbytes
        return scales

    def _send_manifest(
        self,
        kv_scales: Provenance,
        writer: UpdateWriter | None = None,
    ) -> None:
        """Have the engines apply and prove what ``writer`` wrote, or else the weights."""
        written = writer or self._writer
        manifest = Manifest(
            version=self._version,
            base=self.base if writer is None else None,
            payload_nbytes=written.nbytes,
            tensors=tuple(written.records.values()),
            kv_scales=kv_scales,
        )
        self._announce({"manifest": manifest.model_dump(mode="json")})


def check_scales(kv_scales: KVScales | KVMeasure | None, version: int, layout: Layout) -> None:
    """Refuse scales of another version or of other layers than the engine's.

    Raises KVScaleError, SourceError.
    """
    if callable(kv_scales):
        if not layout.scales:
            raise SourceError(f"version {version}: KV scales of no layer; was kv_layers set?")
        return
    if kv_scales is not None and kv_scales.version != version:
        raise KVScaleError(
            f"version {version} is published with KV scales that were measured on version "
            f"{kv_scales.version}; measure them on the weights that are sent"
        )
    sent = kv_scales.tensors() if kv_scales is not None else {}
    refuse_missing(version, layout.scales, sent)
    for name in sent:
        if name not in layout.scales:
            raise SourceError(f"{name} has no place in an update; was kv_layers set?")


def provenance_of(scales: KVScales | None) -> KVProvenance | None:
    """What a manifest says of where these scales come from; None without scales."""
    if scales is None:
        return None
    return KVProvenance(version=scales.version, observer=scales.observer, tokens=scales.tokens)
