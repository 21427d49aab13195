"""The trainer's side of an update: quantize at the source, publish, and know that it arrived.

One weight goes one way: source (Hugging Face name) -> plan -> blockwise FP8, written straight into
the segment, with its digest -> the engine's receiver. Only when every tensor lies in the segment
does the engine hear of the update, so a NaN in a weight or a source that breaks leaves the engine
as it was. The control calls are the four of vLLM's ``VLLMWeightSyncClient``; any object that has
them can be the client.

Where the trainer is sharded, every rank calls ``publish`` (iterating the source is a collective)
and only the rank that holds a client writes and sends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fp8rl.quant import (
    QKV,
    EngineTensor,
    FP32Source,
    KVScales,
    NonFiniteWeightError,
    QuantizedTensor,
    QuantPlan,
    kv_scale_name,
    quantize_blockwise,
)
from fp8rl.sync.errors import SourceError
from fp8rl.sync.manifest import DTYPE_NAMES, KVProvenance, Manifest, TensorRecord, align, digest
from fp8rl.sync.segment import Segment
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


@dataclass(frozen=True)
class _Slot:
    """Where one engine tensor lies in the segment."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


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
        self._plan = plan
        self._client = client
        self._fp32_as = fp32_as
        self._segment: Segment | None = None
        self._slots: dict[str, _Slot] = {}
        end = 0
        scale_names = [kv_scale_name(i, x) for i in range(kv_layers) for x in QKV]
        scales = [EngineTensor(name, torch.float32, (1,)) for name in scale_names]
        for name, dtype, shape in plan.engine_tensors() + scales:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._slots[name] = _Slot(dtype, shape, end, nbytes)
            end = align(end + nbytes)
        if client is not None:
            self._segment = Segment.create(end)
            client.init_weight_transfer_engine({"path": self._segment.path, "nbytes": end})

    def __enter__(self) -> Publisher:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the segment."""
        self.close()

    def close(self) -> None:
        """Give the shared memory back."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def publish(
        self, source: WeightSource, *, version: int, kv_scales: KVScales | None
    ) -> SyncReport | None:
        """Send one version; returns when the engine has proven and committed it.

        Args:
            source: the weights of this version; iterated once, in lockstep over trainer ranks.
            version: higher than any committed before.
            kv_scales: measured on this version; None for an engine with a BF16 cache.

        Returns:
            Figures of the update, or None on a rank without a client.

        Raises:
            NonFiniteWeightError: a weight holds NaN or Inf; the engine was not touched.
            SourceError: the source lacks, repeats or misshapes a tensor; the engine was not
                touched.
            EngineError and others: whatever the client raises; the engine then serves nothing until
                the next good publish.
        """
        began = time.perf_counter()
        records: dict[str, TensorRecord] = {}
        bf16_nbytes = 0
        for name, tensor in source:
            if self._segment is not None:
                bf16_nbytes += 2 * tensor.numel()
                self._write(name, tensor, records)
        if self._client is None:
            return None
        provenance = None
        if kv_scales is not None:
            for name, tensor in kv_scales.tensors().items():
                self._put(name, tensor, records)
            provenance = KVProvenance(
                version=kv_scales.version, observer=kv_scales.observer, tokens=kv_scales.tokens
            )
        missing = [name for name in self._slots if name not in records]
        if missing:
            raise SourceError(f"version {version} lacks {len(missing)} tensors: {missing[:5]}")
        manifest = Manifest(version=version, tensors=tuple(records.values()), kv_scales=provenance)
        written = time.perf_counter()
        self._client.start_weight_update()
        self._client.update_weights({"manifest": manifest.model_dump(mode="json")})
        self._client.finish_weight_update(str(version))
        nbytes = sum(record.nbytes for record in records.values())
        ended = time.perf_counter()
        return SyncReport(
            version, len(records), nbytes, bf16_nbytes, written - began, ended - written
        )

    def _write(self, name: str, tensor: torch.Tensor, records: dict[str, TensorRecord]) -> None:
        """Quantize or keep one Hugging Face tensor, and write it with its digest."""
        if self._plan.is_quantized(name):
            self._slot(name, tensor, records)
            quantized = quantize_blockwise(
                tensor,
                name=name,
                fp32_as=self._fp32_as,
                out=self._place(name) if tensor.device.type == "cpu" else None,
            )
            self._put(name, quantized.data, records)
            self._put(f"{name}_scale_inv", quantized.scale_inv, records)
            return
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            first = tuple(bad.nonzero()[0].tolist())
            raise NonFiniteWeightError(name, int(bad.sum()), first, float(tensor[first]))
        self._put(name, tensor.to(self._plan.entry(name).dtype), records)

    def _place(self, name: str) -> QuantizedTensor:
        """The place of a quantized weight in the segment, as a tensor to write."""
        data, scale_inv = (self._view(self._slots[n]) for n in (name, f"{name}_scale_inv"))
        return QuantizedTensor(data, scale_inv, (128, 128), "pow2")

    def _view(self, slot: _Slot) -> torch.Tensor:
        assert self._segment is not None
        return self._segment.view(slot.offset, slot.nbytes).view(slot.dtype).view(slot.shape)

    def _put(self, name: str, tensor: torch.Tensor, records: dict[str, TensorRecord]) -> None:
        slot = self._slot(name, tensor, records)
        view = self._view(slot)
        if tensor.data_ptr() != view.data_ptr():  # not written in place
            view.copy_(tensor.detach())
        records[name] = TensorRecord(
            name=name,
            dtype=DTYPE_NAMES[slot.dtype],
            shape=slot.shape,
            offset=slot.offset,
            nbytes=slot.nbytes,
            digest=digest(view),
        )

    def _slot(self, name: str, tensor: torch.Tensor, records: dict[str, TensorRecord]) -> _Slot:
        """Where a tensor goes; refused where it does not fit there."""
        slot = self._slots.get(name)
        if slot is None:
            raise SourceError(f"{name} has no place in the segment; was kv_layers set?")
        if name in records:
            raise SourceError(f"the source yielded {name} twice")
        if tuple(tensor.shape) != slot.shape:
            raise SourceError(f"{name}: shape {list(tensor.shape)}, planned {list(slot.shape)}")
        return slot
