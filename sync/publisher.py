"""The trainer's side of an update: quantize at the source, publish, and know that it arrived.

One weight goes one way: source (Hugging Face name) -> blockwise FP8 by the plan, where it lies ->
payload -> the engines, which copy it while the next one is quantized. Only when every tensor has
arrived is the manifest sent, and only then is anything applied, so a NaN in a weight or a source
that breaks leaves the engines as they were. KV scales go with the weights, or follow them: measured
in the engine on the weights just applied, they are sent in the same update.

With ``deltas`` the publisher keeps the bytes that it published last, one for each FP8 weight, and
sends what differs from them. The engines take the difference only on top of the very version that
it was taken from; where one does not hold that, all get the whole version, from the same bytes.

Where the trainer is sharded, every rank calls ``publish`` (a pass over the source is a collective)
and only ranks that hold a client write and send.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from fp8rl.quant import FP32Source, KVScales, QuantPlan
from fp8rl.sync.engines import Engines, SyncClient
from fp8rl.sync.errors import BaseMismatchError
from fp8rl.sync.ledger import Ledger
from fp8rl.sync.manifest import Base
from fp8rl.sync.source import WeightSource, destinations, encoded
from fp8rl.sync.transport import Outbox
from fp8rl.sync.transports import SharedMemory, Transport
from fp8rl.sync.update import KVMeasure, Stream, Update, check_scales
from fp8rl.sync.update_writer import Layout


@dataclass(frozen=True)
class SyncReport:
    """One publish in figures.

    kind: whether whole tensors or differences were sent. nbytes: of the payload, KV scales
    included. quantize_seconds: gather, quantize, encode, and the transport, which goes on
    meanwhile. engine_seconds: from the manifest to the commit, without kv_seconds: the time in
    which the engines cannot serve. failed: engines that did not take it -> why; never all of them.
    """

    version: int
    kind: Literal["full", "delta"]
    tensors: int
    nbytes: int
    bf16_nbytes: int  # bytes that the same weights take in BF16
    quantize_seconds: float
    engine_seconds: float
    kv_seconds: float = 0.0  # measuring KV scales in the midst of it, where they follow
    kv_scales: KVScales | None = None  # those published
    failed: dict[int, str] = field(default_factory=dict)


class Publisher:
    """Publishes versions of one model to one or more engines; close it (or use ``with``)."""

    def __init__(
        self,
        plan: QuantPlan,
        engines: SyncClient | Sequence[SyncClient] | None,
        *,
        transport: Transport | None = None,
        kv_layers: int = 0,
        fp32_as: FP32Source | None = None,
        deltas: bool = False,
        full_every: int | None = None,
        mirror: bool = True,
    ) -> None:
        """Open the transport and introduce this publisher to the engines.

        Args:
            plan: which tensors are quantized; its engine tensors are what is sent.
            engines: the engine or its replicas; None on trainer ranks that only take part in
                collectives.
            transport: how the bytes travel; by default through shared memory, within a host.
            kv_layers: attention layers with an FP8 cache, for which scales will be sent.
            fp32_as: what fp32 weights of the source stand for, as in `quantize_blockwise`; they
                are refused without it.
            deltas: keep the bytes published last, in host memory, and send what differs.
            full_every: with deltas, send every n-th version whole all the same, for engines that
                join later by files.
            mirror: have every engine worker keep them too, which deltas need, and an engine that
                should go back to its last version when an update fails.
        """
        if deltas and not mirror:
            raise BaseMismatchError("deltas=True needs mirror=True: what would they be applied to?")
        if full_every is not None and full_every < 1:
            raise BaseMismatchError(f"full_every is {full_every}; every how many versions, from 1?")
        self._plan, self._fp32_as = plan, fp32_as
        self._full_every, self._since_full = full_every, 0
        self._layout = Layout(plan, kv_layers)
        self._parameters = sum(math.prod(entry.shape) for entry in plan.entries)
        self._engines: Engines | None = None
        self._ledger: Ledger | None = None
        self._ledger_base: Base | None = None
        if engines is None:
            return
        clients = [engines] if isinstance(engines, SyncClient) else list(engines)
        if deltas:
            self._ledger = Ledger(self._layout.weights.values())
        largest = self._layout.payload_nbytes(scales=True)
        self._outbox: Outbox = (transport or SharedMemory()).open(largest, len(clients))
        self._engines = Engines(clients, uuid.uuid4().hex, self._outbox, mirror=mirror)
        self._engines.introduce()

    def __enter__(self) -> Publisher:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the transport."""
        self.close()

    def close(self) -> None:
        """Give the transport's memory and connections back."""
        if self._engines is not None:
            self._outbox.close()
            self._engines.close()

    def publish(
        self,
        source: WeightSource,
        *,
        version: int,
        kv_scales: KVScales | KVMeasure | None,
    ) -> SyncReport | None:
        """Send one version; returns when the engines have proven and committed it.

        Args:
            source: the weights of this version; passed over once, in lockstep over trainer ranks.
            version: higher than any committed before.
            kv_scales: measured on this version; None for an engine with a BF16 cache. A callable is
                called on the rank with the client, once the engine has applied and proven the
                weights and before it commits them: it measures through the engine.

        Returns:
            Figures of the update, or None on a rank without a client.

        Raises:
            NonFiniteWeightError: a weight holds NaN or Inf.
            SourceError: the source lacks, repeats or misshapes a tensor, KV scales among them.
            KVScaleError: the scales were measured on another version.
            EngineError and others: whatever the client or the callable raises, where no engine
                took the update; EnginesError for several.

        Whatever goes wrong, every engine goes on serving the version before it, or, where it cannot
        prove that it holds that, nothing.
        """
        to = destinations(source, self._engines is not None)
        stream = encoded(source, self._plan, to=to, fp32_as=self._fp32_as)
        with closing(stream):
            if self._engines is None:
                for _ in stream:
                    pass
                return None
            return self._send(self._engines, stream, version, kv_scales)

    def _send(
        self,
        engines: Engines,
        stream: Stream,
        version: int,
        kv_scales: KVScales | KVMeasure | None,
    ) -> SyncReport:
        """Publish, on a rank that has clients."""
        check_scales(kv_scales, version, self._layout)
        engines.introduce()
        base = self._ledger_base if self._ledger_base == engines.common_base() else None
        if self._full_every is not None and self._since_full >= self._full_every:
            base = None
        self._ledger_base = None  # until the ledger holds this version, whole
        update = Update(self._layout, self._ledger, engines, self._outbox, version, base)
        began = time.perf_counter()
        try:
            update.send(stream, None if callable(kv_scales) else kv_scales)
            sent = time.perf_counter()
            scales = update.apply(kv_scales)
            committed = update.commit()
        except BaseException as error:
            if isinstance(error, Exception):  # who interrupts does not wait for the engines' answer
                update.abandon(f"{type(error).__name__}: {error}")
            raise
        self._ledger_base = committed if self._ledger is not None else None
        self._since_full = 1 if update.base is None else self._since_full + 1
        return SyncReport(
            version=version,
            kind="full" if update.base is None else "delta",
            tensors=len(update.records),
            nbytes=update.nbytes,
            bf16_nbytes=2 * self._parameters,
            quantize_seconds=sent - began,
            engine_seconds=time.perf_counter() - sent - update.kv_seconds,
            kv_seconds=update.kv_seconds,
            kv_scales=scales,
            failed={i: f"{type(e).__name__}: {e}" for i, e in engines.failures.items()},
        )
