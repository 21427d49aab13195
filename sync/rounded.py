"""Tensors that the plan rounds: sent in BF16, with the values that blockwise FP8 leaves of them.

They move through a source as FP8 weights do, quantized where their shards lie, so that a block has
one scale wherever it is cut; what arrives whole is read back. Digest, delta and read-back are of
the values that result; with power-of-two scales BF16 holds them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8rl.quant import QuantizedTensor, QuantPlan, dequantize_blockwise
from fp8rl.quant.tensor import FP8_DTYPE


def moving_dtypes(names: Sequence[str], plan: QuantPlan) -> list[torch.dtype]:
    """Return the dtype in which each tensor of the plan moves: as it is sent, or E4M3."""
    entries = [plan.entry(name) for name in names]
    return [FP8_DTYPE if entry.rounded else entry.dtype for entry in entries]


def arrived(tensor: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor | QuantizedTensor:
    """Return what moved in E4M3 as it is sent: read back where that is another dtype."""
    if isinstance(tensor, QuantizedTensor) and dtype != FP8_DTYPE:
        return dequantize_blockwise(tensor, dtype)
    return tensor
