"""One whole tensor, or a part that shares no block with another, as a plan has it."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8rl.quant import (
    FP32Source,
    NonFiniteWeightError,
    QuantizedTensor,
    ScaleFormat,
    dequantize_blockwise,
    quantize_blockwise,
)
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.errors import SourceError
from fp8rl.sync.fingerprint import finite


def encode(
    name: str,
    tensor: Tensor | QuantizedTensor,
    dtype: torch.dtype,
    fp32_as: FP32Source | None,
    scale_format: ScaleFormat,
) -> Tensor | QuantizedTensor:
    """Return the tensor in `dtype`; E4M3 stands for quantized, with the plan's `scale_format`.

    What is quantized already passes as it is, or is read back where `dtype` is another.

    Raises NonFiniteWeightError on NaN and Inf, also where they come of the cast; SourceError for a
    quantized tensor that the engine does not take; else as `quantize_blockwise`.
    """
    if dtype == FP8_DTYPE and isinstance(tensor, Tensor):
        return quantize_blockwise(tensor, name=name, fp32_as=fp32_as, scale_format=scale_format)
    if dtype == FP8_DTYPE and isinstance(tensor, QuantizedTensor):
        if (tensor.block_size, tensor.scale_format) != (BLOCK_SIZE, scale_format):
            raise SourceError(
                f"{name}: the trainer holds it in blocks of {tensor.block_size} with scales "
                f"{tensor.scale_format!r}, and the engine takes {BLOCK_SIZE} with {scale_format!r}"
            )
        refuse_non_finite(name, tensor.data)
        return tensor
    values = dequantize_blockwise(tensor) if isinstance(tensor, QuantizedTensor) else tensor
    cast = values.detach().to(dtype)
    refuse_non_finite(name, cast)
    return cast


def refuse_non_finite(name: str, tensor: Tensor) -> None:
    """Raise NonFiniteWeightError if a tensor of E4M3, BF16 or fp32 holds NaN or Inf."""
    if finite(tensor):
        return
    codes = tensor.dtype == FP8_DTYPE
    bad = (tensor.view(torch.uint8) & 0x7F) == 0x7F if codes else ~tensor.isfinite()
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise NonFiniteWeightError(name, int(bad.sum()), first, float(tensor[first]))
