"""MXFP8, the format that Blackwell multiplies natively: groups of 32, scales of one byte.

    e     = ceil(log2(amax / 448)), at least -127, the least that E8M0 has; zeros give -127
    byte  = e + 127                        for each 32 consecutive elements of the last dimension
    data  = E4M3(x / 2^e)                  the product is exact, so rounded once

Rounding e up is the rule of cuBLAS, Transformer Engine, torchao (RCEIL) and vLLM. OCP MX v1.0,
which leaves the rule to the implementation, suggests e = floor(log2(amax)) - 8 instead, with which
amax / 2^e can be anything below 512: where it is above 448 the largest elements of a group saturate
and are up to 12.5 % too small. The two differ in groups with an amax in (1.75, 2) * 2^k, about a
fifth of all, and agree elsewhere.

For a group of tiny values (amax at most 448 * 2^-127 = 2.6e-36, byte 0) the peers agree on the byte
alone: vLLM has this data too, Transformer Engine and torchao do not scale it, so it becomes zeros.

Scales are uint8, row-major, as vLLM's checkpoints and Transformer Engine hold them;
`.view(torch.float8_e8m0fnu)` makes them what torch.nn.functional.scaled_mm takes.

The cast is that of `quantize_blockwise` in `pow2` blocks of (1, 32), by its fast paths; only groups
that fp32 scales (normal numbers, 1.0 for zeros) treat otherwise are cast once more. Source: OCP
Microscaling Formats (MX) v1.0, sections 5.2 and 6.3; cuBLAS, 1D block scaling; Transformer Engine,
common/cast/mxfp8. Left out: the swizzled order of scales that a GEMM reads, which its own library
makes; groups down a column, which a backward would need.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from fp8rl.quant.blockwise import FP32Source, quantize_blockwise, weight_values
from fp8rl.quant.errors import QuantFormatError
from fp8rl.quant.reference import block_amax, cast_with_scale
from fp8rl.quant.scales import E4M3_MAX
from fp8rl.quant.tensor import FP8_DTYPE, check_one_device, scale_shape

MX_GROUP: Final = 32

_BLOCK = (1, MX_GROUP)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MANTISSA_BITS: Final = 23
_TOP_MANTISSA_BIT: Final = 0x400000
_TINIEST: Final = 2.0**-127  # byte 0
_BYTE_OF_1: Final = 127
_CHUNK: Final = 2**20  # elements


@dataclass(frozen=True, eq=False)
class MXFP8Tensor:
    """An MXFP8 tensor.

    data: float8_e4m3fn [.., N, K]. scale_inv: uint8 [.., N, ceil(K/32)], E8M0: the multiplier that
    dequantizes is 2^(scale_inv - 127).

    Raises QuantFormatError where these do not fit together.
    """

    data: Shaped[Tensor, "*lead n k"]
    scale_inv: UInt8[Tensor, "*lead n kb"]

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        if self.data.dtype != FP8_DTYPE or self.data.ndim < 2:
            raise QuantFormatError(
                f"data must be {FP8_DTYPE} [.., N, K], found {self.data.dtype} "
                f"{tuple(self.data.shape)}"
            )
        expected = scale_shape(self.shape, _BLOCK)
        if self.scale_inv.dtype != torch.uint8 or tuple(self.scale_inv.shape) != expected:
            raise QuantFormatError(
                f"scale_inv of data {self.shape} must be torch.uint8 {expected}, found "
                f"{self.scale_inv.dtype} {tuple(self.scale_inv.shape)}"
            )
        check_one_device(self.data, self.scale_inv)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the data, which is the shape of the tensor that was quantized."""
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales together."""
        return self.data.nbytes + self.scale_inv.nbytes


def quantize_mxfp8(
    x: Float[Tensor, "*lead n k"],
    *,
    name: str = "tensor",
    fp32_as: FP32Source | None = None,
) -> MXFP8Tensor:
    """Quantize a weight or activations, [N, K] or [E, N, K], along the last dimension.

    `x` is bf16, fp16 or fp32; fp32 needs `fp32_as` as in `quantize_blockwise`: "master" takes the
    values as they are, "export" rounds them to bf16 first. `name` is for error messages. A last
    group shorter than 32 is as if padded with zeros.

    Raises NonFiniteWeightError on NaN or Inf, QuantFormatError on another dtype or rank.
    """
    values = weight_values(x, fp32_as, name)
    q = quantize_blockwise(values, block_size=_BLOCK, name=name, fp32_as=fp32_as)
    byte = (q.scale_inv.view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8)  # a normal power of 2
    # pow2's least scale is 2^-126, and zeros have 1.0: rows with either are looked at again.
    rows = ((byte == 1) | (byte == _BYTE_OF_1)).any(dim=-1).nonzero()
    for part in torch.split(rows, max(_CHUNK // max(x.shape[-1], 1), 1)):
        _recast_tiny(values, part.unbind(-1), q.data, byte)
    return MXFP8Tensor(q.data, byte)


def _recast_tiny(x: Tensor, rows: tuple[Tensor, ...], data: Tensor, byte: Tensor) -> None:
    """Cast these rows again, groups that fit 2^-127 with that scale, into `data` and `byte`."""
    values, bytes_here = x[rows], byte[rows]
    tiny = block_amax(values, _BLOCK) <= E4M3_MAX * _TINIEST
    bytes_here = torch.where(tiny, 0, bytes_here)
    inverse_bits = (2 * _BYTE_OF_1 - bytes_here.to(torch.int32)) << _MANTISSA_BITS
    codes = cast_with_scale(values, inverse_bits.view(torch.float32), _BLOCK)
    data.view(torch.uint8)[rows] = codes.view(torch.uint8)
    byte[rows] = bytes_here


def dequantize_mxfp8(
    q: MXFP8Tensor, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*lead n k"]:
    """Return `data * 2^(scale_inv - 127)` as `dtype` (bf16, fp16 or fp32), exact in fp32.

    Also reads what others wrote: byte 0 is 2^-127, byte 255 makes its group NaN.
    """
    if dtype not in _DTYPES:
        raise QuantFormatError(f"dtype must be one of {_DTYPES}, found {dtype}")
    byte = q.scale_inv.to(torch.int32)
    bits = byte << _MANTISSA_BITS
    # fp32 has no exponent for either end: 2^-127 is denormal, and all ones need a bit to be NaN.
    bits = torch.where((byte == 0) | (byte == 255), bits | _TOP_MANTISSA_BIT, bits)
    scale = bits.view(torch.float32).repeat_interleave(MX_GROUP, dim=-1)[..., : q.shape[-1]]
    return q.data.float().mul_(scale).to(dtype)
