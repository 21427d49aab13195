"""`QuantizedTensor`: blockwise FP8 data together with the scales that read it back.

    x[..., i, j] ~= data[..., i, j] * scale_inv[..., i // bn, j // bk]

`scale_inv` is the multiplier that dequantizes, as checkpoints store it (`weight_scale_inv`). The
last block of a row or column may be ragged. Leading dimensions (experts) have blocks of their own.
Left out: any other layout (packed, transposed, padded); kernels make those from this one.
"""

import math
from dataclasses import dataclass
from typing import Final, get_args

import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from fp8rl.quant.errors import QuantFormatError
from fp8rl.quant.scales import ScaleFormat

FP8_DTYPE: Final = torch.float8_e4m3fn


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of `scale_inv` for data of `shape`: [.., ceil(N/bn), ceil(K/bk)]."""
    *lead, n, k = shape
    return (*lead, math.ceil(n / block_size[0]), math.ceil(k / block_size[1]))


def check_format(block_size: tuple[int, int], scale_format: str) -> None:
    """Raise QuantFormatError unless the block size is two positive ints and the format is known."""
    if len(block_size) != 2 or any(not isinstance(b, int) or b < 1 for b in block_size):
        raise QuantFormatError(f"block_size must be two positive integers, found {block_size!r}")
    known = get_args(ScaleFormat)
    if scale_format not in known:
        raise QuantFormatError(f"scale_format must be one of {known}, found {scale_format!r}")


def check_one_device(data: Tensor, scale_inv: Tensor) -> None:
    """Raise QuantFormatError unless data and scales are on one device."""
    if scale_inv.device != data.device:
        raise QuantFormatError(
            f"scale_inv is on {scale_inv.device} and data on {data.device}; move both to one device"
        )


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A blockwise-FP8 tensor.

    data: float8_e4m3fn [.., N, K].
    scale_inv: float32 [.., ceil(N/bn), ceil(K/bk)], on the same device.
    block_size: (bn, bk); (128, 128) for weights, (1, 128) for activations.
    scale_format: the rule that made `scale_inv`.

    Raises QuantFormatError where these do not fit together.
    """

    data: Shaped[Tensor, "*lead n k"]
    scale_inv: Float32[Tensor, "*lead nb kb"]
    block_size: tuple[int, int]
    scale_format: ScaleFormat

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        check_format(self.block_size, self.scale_format)
        if self.data.dtype != FP8_DTYPE:
            raise QuantFormatError(f"data must be {FP8_DTYPE}, found {self.data.dtype}")
        if self.data.ndim < 2:
            raise QuantFormatError(f"data must be [.., N, K], found shape {tuple(self.data.shape)}")
        if self.scale_inv.dtype != torch.float32:
            raise QuantFormatError(f"scale_inv must be float32, found {self.scale_inv.dtype}")
        expected = scale_shape(self.shape, self.block_size)
        if tuple(self.scale_inv.shape) != expected:
            raise QuantFormatError(
                f"scale_inv of data {self.shape} in blocks of {self.block_size} must have shape "
                f"{expected}, found {tuple(self.scale_inv.shape)}"
            )
        check_one_device(self.data, self.scale_inv)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the data, which is the shape of the tensor that was quantized."""
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales together: what this tensor costs on a wire."""
        return self.data.nbytes + self.scale_inv.nbytes
