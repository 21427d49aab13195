"""Writes one version's tensors into the shared segment, quantized as planned, with their digests.

Every tensor has a fixed place, laid out once from the plan, KV scales after the weights. FP8
weights are quantized straight into theirs. What is written becomes a record of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from fp8rl.sync.admission import shown
from fp8rl.sync.errors import SourceError
from fp8rl.sync.manifest import DTYPE_NAMES, TensorRecord, align, digest
from fp8rl.sync.segment import Segment

Records = dict[str, TensorRecord]


@dataclass(frozen=True)
class _Slot:
    """Where one engine tensor lies in the segment."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SegmentWriter:
    """The segment of one model, as its trainer writes it."""

    def __init__(self, plan: QuantPlan, kv_layers: int, fp32_as: FP32Source | None) -> None:
        self._plan = plan
        self._fp32_as = fp32_as
        self._slots: dict[str, _Slot] = {}
        self.weights = [tensor.name for tensor in plan.engine_tensors()]
        self.scales = [kv_scale_name(i, x) for i in range(kv_layers) for x in QKV]
        end = 0
        scales = [EngineTensor(name, torch.float32, (1,)) for name in self.scales]
        for name, dtype, shape in plan.engine_tensors() + scales:
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self._slots[name] = _Slot(dtype, shape, end, nbytes)
            end = align(end + nbytes)
        self.segment = Segment.create(end)

    def write_weight(self, name: str, tensor: torch.Tensor, records: Records) -> None:
        """Quantize or keep one Hugging Face tensor, write it and record it."""
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

    def write_scales(self, scales: KVScales, records: Records) -> None:
        """Write and record every KV scale."""
        for name, tensor in scales.tensors().items():
            self._put(name, tensor, records)

    def _place(self, name: str) -> QuantizedTensor:
        """The place of a quantized weight in the segment, as a tensor to write."""
        data, scale_inv = (self._view(self._slots[n]) for n in (name, f"{name}_scale_inv"))
        return QuantizedTensor(data, scale_inv, (128, 128), "pow2")

    def _view(self, slot: _Slot) -> torch.Tensor:
        return self.segment.view(slot.offset, slot.nbytes).view(slot.dtype).view(slot.shape)

    def _put(self, name: str, tensor: torch.Tensor, records: Records) -> None:
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

    def _slot(self, name: str, tensor: torch.Tensor, records: Records) -> _Slot:
        """Where a tensor goes; refused where it does not fit there."""
        slot = self._slots.get(name)
        if slot is None:
            raise SourceError(f"{name} has no place in the segment; was kv_layers set?")
        if name in records:
            raise SourceError(f"the source yielded {name} twice")
        if tuple(tensor.shape) != slot.shape:
            raise SourceError(f"{name}: shape {list(tensor.shape)}, planned {list(slot.shape)}")
        return slot


def refuse_missing(version: int, expected: list[str], records: Records) -> None:
    """Raise SourceError with the names of the tensors that were not written."""
    missing = [name for name in expected if name not in records]
    if missing:
        raise SourceError(f"version {version} lacks {len(missing)} tensors: {shown(missing)}")
