"""The error of each quantized tensor of a checkpoint, added up piece by piece.

Sums over pieces of whole blocks add up to those of the tensor, so no tensor has to be in memory:

    relative_rms = |x - y| / |x|                     sqnr_db = -20 log10(relative_rms)
    saturated    = elements with the largest code, +-448, as a fraction
    zero_blocks  = blocks all of whose codes are 0

with x the values of the source file and y the dequantized ones, added up in float64, and the pieces
with math.fsum, so the result does not depend on where a conversion was interrupted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fp8rl.quant.blockwise import dequantize_blockwise
from fp8rl.quant.reference import blocked
from fp8rl.quant.tensor import QuantizedTensor, scale_shape

_MAGNITUDE: Final = 0x7F  # all bits but the sign
_LARGEST: Final = 0x7E  # the code of 448
_STRIP: Final = 2**17  # elements; what is made of them stays in the cache


class ErrorSums(NamedTuple):
    """Of one piece of a tensor: sums of x^2 and (x - y)^2, and two counts."""

    energy: float
    noise: float
    saturated: int
    zero_blocks: int


@dataclass(frozen=True)
class TensorError:
    """How far a quantized tensor is from its source; see the module for the formulas."""

    name: str
    shape: tuple[int, ...]
    relative_rms: float
    sqnr_db: float
    saturated: float
    zero_blocks: int
    blocks: int


def error_sums(x: Float[Tensor, "n k"], q: QuantizedTensor) -> ErrorSums:
    """Sum up the error of a piece whose rows are whole blocks, a strip of them at a time."""
    block_rows = max(_STRIP // (q.block_size[0] * x.shape[1]), 1)
    rows = block_rows * q.block_size[0]
    strips = zip(
        torch.split(x, rows),
        torch.split(q.data, rows),
        torch.split(q.scale_inv, block_rows),
        strict=True,
    )
    energy, noise, saturated, zero_blocks = [], [], 0, 0
    for values, codes, scales in strips:
        strip = QuantizedTensor(codes, scales, q.block_size, q.scale_format)
        x32 = values.float()
        difference = dequantize_blockwise(strip, torch.float32).sub_(x32)  # exact: y in [x/2, 2x]
        noise.append(_energy(difference))
        energy.append(_energy(x32))
        magnitudes = codes.view(torch.uint8) & _MAGNITUDE
        saturated += int((magnitudes == _LARGEST).sum())
        zero_blocks += int((blocked(magnitudes, q.block_size).amax(dim=(-3, -1)) == 0).sum())
    return ErrorSums(math.fsum(energy), math.fsum(noise), saturated, zero_blocks)


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def tensor_error(
    name: str, shape: tuple[int, ...], block_size: tuple[int, int], pieces: Iterable[ErrorSums]
) -> TensorError:
    """Join the sums of all pieces of a tensor."""
    held = list(pieces)
    energy = math.fsum(piece.energy for piece in held)
    noise = math.fsum(piece.noise for piece in held)
    elements = math.prod(shape)
    if noise == 0.0:
        relative, decibels = 0.0, math.inf
    elif energy == 0.0:
        relative, decibels = math.inf, -math.inf
    else:
        relative, decibels = math.sqrt(noise / energy), -10 * math.log10(noise / energy)
    return TensorError(
        name,
        shape,
        relative,
        decibels,
        sum(piece.saturated for piece in held) / elements if elements else 0.0,
        sum(piece.zero_blocks for piece in held),
        math.prod(scale_shape(shape, block_size)),
    )
