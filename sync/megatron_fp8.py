"""Weights that Megatron itself holds in blockwise FP8: their own bytes are published.

A trainer with `fp8_param` holds its linears as Transformer Engine's `Float8BlockwiseQTensor`, cast
from fp32 masters, and computes with those bytes; they go out as they are
(``quant/transformer_engine.py``). TE counts blocks from the first row of a rank's parameter, a
checkpoint from the first row of each tensor in it, so every run of a tensor but its last must be
whole blocks of the parameter.

Left out: other kinds of FP8 weights (per-tensor scales, MXFP8), which are refused. None of this has
been run with Transformer Engine yet, which has no CPU build; what is pure here is tested.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fp8rl.quant import QuantizedTensor
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.quant.transformer_engine import from_transformer_engine
from fp8rl.sync.errors import SourceError
from fp8rl.sync.megatron_layout import Held

BLOCKWISE = "Float8BlockwiseQTensor"  # told by its name: Transformer Engine need not be installed


def holds_fp8(held: Held) -> bool:
    """Tell whether a parameter is blockwise FP8.

    Raises SourceError where it is neither that nor a plain tensor, or its blocks are not those of
    the tensors in it.
    """
    kind = type(held.parameter)
    if kind in (Tensor, nn.Parameter):
        return False
    if kind.__name__ != BLOCKWISE:
        raise SourceError(
            f"parameter {held.name!r} is a {kind.__name__}; expected a plain tensor or {BLOCKWISE} "
            "(fp8_recipe=blockwise with fp8_param)"
        )
    for part in held.parts:
        block, length = BLOCK_SIZE[part.dim], held.shape[part.dim]
        for first, size in part.runs:
            if first % block or (size % block and first + size != length):
                raise SourceError(
                    f"parameter {held.name!r} is FP8 in blocks of {block}, and rows or columns "
                    f"{first} to {first + size} of it are {part.name}, which are not whole blocks; "
                    "build the model without fp8_param, or with sizes that are multiples of "
                    f"{block} on every rank"
                )
    return True


def fp8_part(held: Held, dim: int, runs: Sequence[tuple[int, int]]) -> QuantizedTensor:
    """Return the bytes and scales of some runs of whole blocks of a blockwise FP8 parameter."""
    return take_blocks(from_transformer_engine(held.parameter, name=held.name), dim, runs)


def take_blocks(
    whole: QuantizedTensor, dim: int, runs: Sequence[tuple[int, int]]
) -> QuantizedTensor:
    """Return runs (first, size) of whole blocks along `dim`, one after another."""
    block = whole.block_size[dim]
    codes = whole.data.view(torch.uint8)
    data = [codes.narrow(dim, first, size) for first, size in runs]
    scales = [
        whole.scale_inv.narrow(dim, first // block, -(-size // block)) for first, size in runs
    ]
    return QuantizedTensor(
        (data[0] if len(runs) == 1 else torch.cat(data, dim)).view(FP8_DTYPE),
        scales[0] if len(runs) == 1 else torch.cat(scales, dim),
        whole.block_size,
        whole.scale_format,
    )
