"""The ways to cast a weight to blockwise FP8 that `fp8rl bench quant` compares.

Each takes a bf16 weight [N, K] (or experts [E, N, K]) and gives data and scales. The copies, which
cast nothing, show what the memory allows. Others' packages are used as their users get them, and
are left out by name where they are not installed. The peers differ in detail (torchao has fp32
scales, all but ours take matrices one by one); what each computes is compared with our reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fp8rl.quant import QuantizedTensor, empty_quantized, quantize_blockwise
from fp8rl.quant.chunked import chunked_cast
from fp8rl.quant.reference import reference_cast
from fp8rl.quant.scales import ScaleFormat

Parts = tuple[Tensor, Tensor]
Cast = Callable[[Tensor], Parts]

CLONE, COPY = "torch.clone", "copy_ into a buffer"
OURS, INTO, CHUNKED = "fp8rl", "fp8rl into a buffer", "fp8rl without a compiler"
REFERENCE = "fp8rl reference"
VLLM, HUGGING_FACE, TORCHAO = "vLLM", "transformers", "torchao, compiled"


@dataclass(frozen=True)
class Way:
    """One way: `prepare(weight)` gives the call to time, whose result is (data, scale_inv)."""

    name: str
    prepare: Callable[[Tensor], Callable[[], Parts | Tensor]]
    scale_format: ScaleFormat | None = None  # None: it copies
    package: str | None = None  # that it needs
    function: str = ""  # what is called

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or find_spec(self.package) is not None


def ways() -> list[Way]:
    """All of them; those of packages that are not installed are not `available`."""
    cpu = not torch.cuda.is_available()
    found = [
        Way(CLONE, lambda w: w.clone, function="torch.clone"),
        Way(COPY, _copy, function="Tensor.copy_"),
        Way(OURS, lambda w: lambda: _parts(quantize_blockwise(w)), "pow2"),
        Way(INTO, _into, "pow2", function="quantize_blockwise(.., out=)"),
        Way(CHUNKED, _chunked, "pow2", function="fp8rl.quant.chunked"),
        Way(REFERENCE, _reference, "pow2", function="fp8rl.quant.reference"),
        Way(VLLM, _vllm, "pow2", "vllm", "vllm.utils.deep_gemm.per_block_cast_to_fp8"),
        Way(HUGGING_FACE, _transformers, "pow2", "transformers", "Fp8Quantize"),
        Way(TORCHAO, _torchao, "fp32", "torchao", "torch_blockwise_scale_weight_quant"),
    ]
    return found if cpu else [way for way in found if way.name != CHUNKED]


def vllm_cast(weight: Tensor) -> Parts:
    """Cast one matrix by vLLM's helper for blocks, with power-of-two scales."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    parts: Parts = per_block_cast_to_fp8(weight, [128, 128], use_ue8m0=True)
    return parts


def _parts(q: QuantizedTensor) -> Parts:
    return q.data, q.scale_inv


def _copy(weight: Tensor) -> Callable[[], Tensor]:
    buffer = torch.empty_like(weight)
    return lambda: buffer.copy_(weight)


def _into(weight: Tensor) -> Callable[[], Parts]:
    out = empty_quantized(tuple(weight.shape), device=weight.device)
    return lambda: _parts(quantize_blockwise(weight, out=out))


def _chunked(weight: Tensor) -> Callable[[], Parts]:
    def call() -> Parts:
        out = empty_quantized(tuple(weight.shape), device=weight.device)
        chunked_cast(weight, out)
        return _parts(out)

    return call


def _reference(weight: Tensor) -> Callable[[], Parts]:
    return lambda: reference_cast(weight, (128, 128), "pow2")


def _vllm(weight: Tensor) -> Callable[[], Parts]:
    return _each_matrix(weight, vllm_cast)


def _transformers(weight: Tensor) -> Callable[[], Parts]:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0")
    operation = Fp8Quantize(SimpleNamespace(quantization_config=config))

    def call() -> Parts:
        result: dict[str, Tensor] = operation.convert({"w.weight": weight})
        return result["w.weight"], result["w.weight_scale_inv"]

    return call


def _torchao(weight: Tensor) -> Callable[[], Parts]:
    from torchao.prototype.blockwise_fp8_training import kernels

    compiled: Any = torch.compile(kernels.torch_blockwise_scale_weight_quant)
    return _each_matrix(weight, compiled)


def _each_matrix(weight: Tensor, cast: Cast) -> Callable[[], Parts]:
    if weight.ndim == 2:
        return lambda: cast(weight)

    def call() -> Parts:
        parts = [cast(matrix) for matrix in weight]
        return torch.stack([data for data, _ in parts]), torch.stack([s for _, s in parts])

    return call


@contextmanager
def quiet() -> Iterator[None]:
    """Without what packages log while they load, about kernels of theirs that are not used here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
