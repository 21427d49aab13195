"""Where weights come from: a re-iterable stream of Hugging Face-named tensors.

The contract is that of vLLM's ``WeightSource`` (``metadata`` and iteration agree element for
element; every iteration is a fresh pass; ranks that share a tensor iterate in lockstep), stated
here as a protocol so that a trainer needs no vLLM installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype and full (unsharded, Hugging Face) shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@runtime_checkable
class WeightSource(Protocol):
    """Anything that yields the policy's weights under Hugging Face names."""

    def metadata(self) -> list[TensorMeta]:
        """What iteration will yield, in order, without moving data."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``(name, full tensor)``; a collective where the trainer is sharded."""
        ...


class IterableSource:
    """A source over tensors that already lie here whole, such as a state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]):
        self._tensors = dict(tensors)

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every tensor, in order."""
        return [TensorMeta(n, t.dtype, tuple(t.shape)) for n, t in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors themselves; nothing is copied."""
        yield from self._tensors.items()


def encoded(source, plan, *, to, fp32_as=None):
    from fp8rl.quant import NonFiniteWeightError, quantize_blockwise

    for name, tensor in source:
        if plan.is_quantized(name):
            yield name, quantize_blockwise(tensor, name=name, fp32_as=fp32_as)
        else:
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                first = tuple(bad.nonzero()[0].tolist())
                raise NonFiniteWeightError(name, int(bad.sum()), first, float(tensor[first]))
            yield name, tensor.to(plan.entry(name).dtype)
