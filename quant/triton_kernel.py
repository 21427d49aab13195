"""The cast on a CUDA device: amax, scale and codes of a block in one read of the input.

One program takes a tile of [rows, bk] elements that holds whole blocks: one block of a weight
(128 x 128), or 32 rows of groups of an activation (1 x 128). The tile stays in registers between
the amax and the cast, so the traffic is one read of the input and one write of the codes.

    amax   in fp32, through the bits of |x|: as integers NaN and Inf win every maximum
    scale  as in scales.py: exponent bits for pow2; two divisions rounded to nearest for fp32
    codes  the hardware's E4M3 cast (nearest, ties to even), which needs compute capability 8.9

Ragged edges are masked and read as zeros. The input's row and expert strides are free, its last
dimension has stride 1; the output is contiguous and may be a view of a send buffer.

Older devices (A100) go through chunked.py, and a warning says so once. Left out: E8M0 scale bytes,
transposed outputs. Checked by tests marked `gpu`, which have not been run on a GPU yet; without one
the kernel is compiled for sm_90 and its arithmetic, but for the final cast, run in Triton's
interpreter (whose FP8 cast rounds wrongly).
"""

import warnings
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fp8rl.quant.scales import ScaleFormat
from fp8rl.quant.tensor import QuantizedTensor

OLDEST: Final = (8, 9)  # compute capability with a hardware E4M3 cast
_TILE_ROWS: Final = 32  # rows of a tile of blocks that are one row high


@cache
def runs_on(device: torch.device) -> bool:
    """Tell whether the kernel runs on this device; warn, once, where it does not."""
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return True
    warnings.warn(
        f"fp8rl quantizes on {device} (compute capability {found}) without its kernel, which needs "
        f"{OLDEST}: slower, with the same result",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def triton_cast(x: Float[Tensor, "*lead n k"], out: QuantizedTensor, sticky: bool = False) -> None:
    """Quantize `x` (bf16, fp16 or fp32, not empty) into `out`, in `out`'s format.

    sticky: `out` holds the previous scales, from which sticky scales go on.
    """
    n, k = x.shape[-2:]
    bn, scales = out.block_size[0], out.scale_inv
    x = x.reshape(-1, n, k)
    if x.stride(-1) != 1:
        x = x.contiguous()
    tile = constants_of(out.block_size, out.scale_format, sticky)
    rows_here = tile["TILE_ROWS"] if bn == 1 else bn
    grid = (scales.shape[-1], triton.cdiv(n, rows_here), x.shape[0])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_kernel[grid](
            x,
            out.data,
            scales,
            n,
            k,
            x.stride(0),
            x.stride(1),
            scales.shape[-2],
            **tile,
            num_warps=8 if bn > 1 else 4,
        )


def constants_of(
    block_size: tuple[int, int], scale_format: ScaleFormat, sticky: bool = False
) -> dict[str, int]:
    """Return what `quantize_kernel` is compiled for, by parameter."""
    bn, bk = block_size
    return {
        "BLOCK_ROWS": bn,
        "BLOCK_COLUMNS": bk,
        "TILE_ROWS": _TILE_ROWS if bn == 1 else triton.next_power_of_2(bn),
        "TILE_COLUMNS": triton.next_power_of_2(bk),
        "POW2": scale_format == "pow2",
        "STICKY": sticky,
    }


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    data_pointer,
    scale_pointer,
    n,
    k,
    expert_stride,
    row_stride,
    scale_rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    POW2: tl.constexpr,
    STICKY: tl.constexpr,
):
    """Quantize one tile; grid: (blocks along K, tiles along N, experts)."""
    column_block, tile, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows_here: tl.constexpr = TILE_ROWS if BLOCK_ROWS == 1 else BLOCK_ROWS
    row_in_tile = tl.arange(0, TILE_ROWS)
    column_in_block = tl.arange(0, TILE_COLUMNS)
    rows = tile.to(tl.int64) * rows_here + row_in_tile
    columns = column_block * BLOCK_COLUMNS + column_in_block
    inside = (row_in_tile < rows_here) & (rows < n)
    inside = inside[:, None] & ((column_in_block < BLOCK_COLUMNS) & (columns < k))[None, :]
    at = expert * expert_stride + rows[:, None] * row_stride + columns[None, :]
    x = tl.load(x_pointer + at, mask=inside, other=0.0).to(tl.float32)

    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax_bits = tl.max(bits, axis=1)  # of each row
    if BLOCK_ROWS > 1:
        amax_bits = tl.max(amax_bits, axis=0)[None]  # of the block
    scale, scale_inv = scale_of_bits(amax_bits, POW2)
    scale_columns = tl.num_programs(0)
    scale_row = tile + tl.arange(0, 1) if BLOCK_ROWS > 1 else tile * TILE_ROWS + row_in_tile
    to_scale = (expert * scale_rows + scale_row) * scale_columns + column_block
    if STICKY:  # sticky.py
        previous = tl.load(scale_pointer + to_scale, mask=scale_row < scale_rows, other=0.0)
        kept = (previous == 2 * scale_inv) & (amax_bits != 0)
        scale = tl.where(kept, 0.5 * scale, scale)
        scale_inv = tl.where(kept, previous, scale_inv)

    scaled = tl.minimum(tl.maximum(x * scale[:, None], -448.0), 448.0)
    to = expert * n * k + rows[:, None] * k + columns[None, :]
    tl.store(data_pointer + to, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scale_pointer + to_scale, scale_inv, mask=scale_row < scale_rows)


@triton.jit  # type: ignore[untyped-decorator]
def scale_of_bits(amax_bits, POW2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return (scale, scale_inv) of amax given as fp32 bits: scales.py, case by case."""
    if POW2:
        above = ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 = 1.75 * 2^8
        exponent = tl.maximum((amax_bits >> 23) - 127 - 8 + above, -126)
        scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        scale_inv = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.minimum(tl.div_rn(tl.full(amax.shape, 448.0, tl.float32), amax), 8.507059e37)
        scale_inv = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    scale = tl.where(amax_bits == 0, 1.0, scale)
    scale_inv = tl.where(amax_bits == 0, 1.0, scale_inv)
    finite = amax_bits < 0x7F800000
    return scale, tl.where(finite, scale_inv, float("nan"))
