"""Turns the tensors of one version into a payload and the records of its manifest.

    full    every tensor whole, into the outbox while the next is quantized
    delta   what differs from the ledger, encoded; unchanged tensors do not travel

Either way each tensor is fingerprinted as it is now, and the ledger, where one is kept, holds the
new bytes afterwards. KV scales come after the weights, always whole.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.quant import (
    QKV,
    EngineTensor,
    KVScales,
    QuantizedTensor,
    QuantPlan,
    kv_scale_name,
)
from fp8rl.sync.admission import as_bytes, shown
from fp8rl.sync.delta import Width, encode_delta
from fp8rl.sync.errors import SourceError
from fp8rl.sync.fingerprint import fingerprint
from fp8rl.sync.ledger import Ledger
from fp8rl.sync.manifest import DTYPE_NAMES, Parcel, TensorRecord, align

Records = dict[str, TensorRecord]
Sink = Callable[[Tensor], object]


class Layout:
    """What one version of a model consists of: its engine tensors, then its KV scales."""

    def __init__(self, plan: QuantPlan, kv_layers: int) -> None:
        self.weights = {tensor.name: tensor for tensor in plan.engine_tensors()}
        names = [kv_scale_name(i, x) for i in range(kv_layers) for x in QKV]
        self.scales = {name: EngineTensor(name, torch.float32, (1,)) for name in names}

    def payload_nbytes(self, *, scales: bool) -> int:
        """Bytes of a full payload."""
        return _aligned(self.weights) + (self.scales_nbytes if scales else 0)

    @property
    def scales_nbytes(self) -> int:
        """Bytes of a payload of KV scales alone."""
        return _aligned(self.scales)


def _aligned(tensors: Mapping[str, EngineTensor]) -> int:
    sizes = (torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors.values())
    return sum(align(size) for size in sizes)


class UpdateWriter:
    """Writes one version; ``sink`` gets its payload in order."""

    def __init__(self, layout: Layout, sink: Sink, ledger: Ledger | None, *, delta: bool) -> None:
        self._layout, self._sink, self._ledger, self._delta = layout, sink, ledger, delta
        self.records: Records = {}
        self.nbytes = 0

    def weight(self, name: str, value: QuantizedTensor | Tensor) -> None:
        """Write one weight as the plan has it: data and scales, or the tensor."""
        if isinstance(value, QuantizedTensor):
            self._write(name, value.data)
            self._write(f"{name}_scale_inv", value.scale_inv)
        else:
            self._write(name, value)

    def scales(self, scales: KVScales) -> None:
        """Write every KV scale, whole."""
        for name, tensor in scales.tensors().items():
            self._record(name, tensor, self._layout.scales, self._append(as_bytes(tensor)))

    def from_ledger(self, ledger: Ledger) -> None:
        """Write every weight whole, as the ledger has it."""
        for name in self._layout.weights:
            tensor = ledger.tensor(name)
            self._record(name, tensor, self._layout.weights, self._append(as_bytes(tensor)))

    def _write(self, name: str, tensor: Tensor) -> None:
        self._check(name, tensor, self._layout.weights)
        here = tensor.detach().to("cpu").contiguous()
        new = as_bytes(here)
        width: Width = 1 if tensor.dtype.itemsize == 1 else 2
        parcel = self._difference(name, new, width) if self._delta else self._append(new)
        if self._ledger is not None:
            self._ledger.raw(name).copy_(new)
        self._record(name, here, self._layout.weights, parcel)

    def _difference(self, name: str, new: UInt8[Tensor, " n"], width: Width) -> Parcel | None:
        assert self._ledger is not None  # a delta has a base
        old = self._ledger.raw(name)
        if torch.equal(old, new):
            return None
        encoded = encode_delta(old, new, width=width)
        return self._append(new) if encoded is None else self._append(encoded, "delta")

    def _append(
        self, data: UInt8[Tensor, " n"], encoding: Literal["whole", "delta"] = "whole"
    ) -> Parcel:
        parcel = Parcel(encoding=encoding, offset=self.nbytes, nbytes=len(data))
        self._sink(data)
        end = parcel.offset + parcel.nbytes
        self.nbytes = align(end)
        if self.nbytes > end:
            self._sink(torch.zeros(self.nbytes - end, dtype=torch.uint8))
        return parcel

    def _record(
        self,
        name: str,
        tensor: Tensor,
        layout: Mapping[str, EngineTensor],
        parcel: Parcel | None,
    ) -> None:
        self._check(name, tensor, layout)
        self.records[name] = TensorRecord(
            name=name,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            digest=fingerprint(tensor),
            parcel=parcel,
        )

    def _check(self, name: str, tensor: Tensor, layout: Mapping[str, EngineTensor]) -> None:
        """Refuse what has no place, comes twice, or has another shape or dtype than planned."""
        planned = layout.get(name)
        if planned is None:
            raise SourceError(f"{name} has no place in an update; was kv_layers set?")
        if name in self.records:
            raise SourceError(f"the source yielded {name} twice")
        if tuple(tensor.shape) != tuple(planned.shape) or tensor.dtype != planned.dtype:
            raise SourceError(
                f"{name}: shape {list(tensor.shape)} {tensor.dtype}, planned "
                f"{list(planned.shape)} {planned.dtype}"
            )


def refuse_missing(version: int, expected: Iterable[str], sent: Container[str]) -> None:
    """Raise SourceError with the names of the tensors that are not there."""
    missing = [name for name in expected if name not in sent]
    if missing:
        raise SourceError(f"version {version} lacks {len(missing)} tensors: {shown(missing)}")
