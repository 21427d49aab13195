"""The cast on a CPU at the speed of memory: the reference, compiled by torch.compile.

Two graphs stand for the two passes over the weight, the amax of each block and the scaled cast;
the scales between them, a value for each block, are computed by scales.py itself. Both passes see
the weight as [N/bn, bn, K/bk, bk] with N/bn and K/bk dynamic and the block static, so one graph
serves every shape; fp32 values live in registers only.

A ragged last row of blocks goes through chunked.py; so do weights with a ragged last column (no
engine serves them), small tensors and unusual block sizes, for which a compilation (seconds, once a
process) does not pay. Where there is no working compiler, or where what it makes is not equal to
the reference on a probe of all kinds of values, a warning says so once, and everything goes through
chunked.py.

Source: torch.compile, dynamic shapes. Left out: processors other than the CPU.
"""

import math
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fp8rl.quant.chunked import chunked_cast
from fp8rl.quant.reference import reference_cast
from fp8rl.quant.scales import scales_of
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor

BLOCKS: Final = ((128, 128), (1, 128), (1, 32))  # those of weights, activations and MXFP8
SMALLEST: Final = 2**20  # elements; below, chunked.py takes a millisecond

_lock = threading.Lock()
_works: dict[tuple[torch.dtype, tuple[int, int]], bool] = {}


class _NotCompiledError(RuntimeError):
    """torch.compile was switched off from outside and ran the plain function."""


def compiled_cast(
    x: Float[Tensor, "*lead n k"], out: QuantizedTensor, sticky: bool = False
) -> bool:
    """Quantize `x` into `out`, in `out`'s format, or return False: it is not for this path.

    sticky: `out` holds the previous scales, from which sticky scales go on; where this fails
    halfway, some are those of `x`, from which chunked.py gets the same result.

    The first call for a dtype and block size compiles. Without a compiler it warns, once.
    """
    (bn, bk), kind = out.block_size, (x.dtype, out.block_size)
    blocks = [x.shape[-2] // bn, x.shape[-1] // bk]
    if (
        x.numel() < SMALLEST
        or min(blocks) < 2  # sizes 0 and 1 are constants to torch.compile: graphs of their own
        or x.shape[-1] % bk
        or out.block_size not in BLOCKS
    ):
        return False
    with _lock:  # while one thread compiles, torch takes every thread to be compiling
        if kind not in _works:
            _works[kind] = _equals_the_reference(*kind)
        if _works[kind]:
            try:
                _cast(x, out, sticky)
            except _compiler_errors() as error:  # of a graph for another state of torch
                _works[kind] = _warn(_reason(error))
        return _works[kind]


@torch.no_grad()
def _cast(x: Tensor, out: QuantizedTensor, sticky: bool = False) -> None:
    """Quantize each matrix, or all of them as one where no block spans two."""
    n, k = x.shape[-2:]
    if n % out.block_size[0] == 0 and x.is_contiguous():
        n = x.shape[:-1].numel()
    scale_inv = out.scale_inv.view(-1, math.ceil(n / out.block_size[0]), out.scale_inv.shape[-1])
    with torch.autocast("cpu", enabled=False):  # a state of torch is a graph of its own
        for part, codes, inverse in zip(
            x.reshape(-1, n, k), out.data.view(-1, n, k), scale_inv, strict=True
        ):
            _cast_matrix(part.contiguous(), codes, inverse, out, sticky)


def _cast_matrix(
    matrix: Tensor, codes: Tensor, scale_inv: Tensor, out: QuantizedTensor, sticky: bool
) -> None:
    """Quantize the whole rows of blocks of [N, K] by the two graphs, and the rest by chunks."""
    rows = matrix.shape[0] // out.block_size[0]
    bottom = rows * out.block_size[0]
    blocks = _as_blocks(matrix[:bottom], out.block_size)
    amax = _compiled(_block_amax, matrix.dtype, out.block_size)(blocks)
    previous = scale_inv[:rows] if sticky else None
    scale, scale_inv[:rows] = scales_of(amax, out.scale_format, previous)
    torch._dynamo.mark_dynamic(scale, (0, 1))
    target = _as_blocks(codes[:bottom], out.block_size)
    _compiled(_scaled_cast, matrix.dtype, out.block_size)(blocks, scale, target)
    if bottom < matrix.shape[0]:
        rest = QuantizedTensor(codes[bottom:], scale_inv[rows:], out.block_size, out.scale_format)
        chunked_cast(matrix[bottom:], rest, sticky)


def _block_amax(blocks: Tensor) -> Tensor:
    """fp32 [nb, kb] of [nb, bn, kb, bk]."""
    _must_be_compiled()
    return blocks.abs().amax(dim=3).amax(dim=1).float()


def _scaled_cast(blocks: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write the codes of `blocks` [nb, bn, kb, bk] times `scale` [nb, kb] to `out`.

    The reference's clamp changes no code of a finite weight: amax * scale is at most one fp32
    rounding above 448, and everything up to 464 rounds to 448. Without it the cast takes two thirds
    of the time.
    """
    _must_be_compiled()
    out.copy_((blocks.float() * scale[:, None, :, None]).to(FP8_DTYPE))


def _must_be_compiled() -> None:
    if not torch.compiler.is_compiling():
        raise _NotCompiledError("torch.compile is switched off (TORCHDYNAMO_DISABLE, or a stance)")


@cache
def _compiled(
    function: Callable[..., Any], dtype: torch.dtype, block_size: tuple[int, int]
) -> Callable[..., Any]:
    """The function compiled for one input dtype and block size: a bounded number of graphs."""
    return torch.compile(  # type: ignore[call-overload, no-any-return]  # torch's stubs lack the last
        function, fullgraph=True, isolate_recompiles=True, recompile_limit=64
    )


def _as_blocks(matrix: Tensor, block_size: tuple[int, int]) -> Tensor:
    """View contiguous [N, K] as [N/bn, bn, K/bk, bk]."""
    n, k = matrix.shape
    blocks = matrix.view(n // block_size[0], block_size[0], k // block_size[1], block_size[1])
    torch._dynamo.mark_dynamic(blocks, (0, 2))
    torch._dynamo.mark_static(blocks, [1, 3])
    return blocks


def _compiler_errors() -> tuple[type[RuntimeError], ...]:
    return (_NotCompiledError, torch._dynamo.exc.TorchDynamoException)  # loads it: a second


def _equals_the_reference(dtype: torch.dtype, block_size: tuple[int, int]) -> bool:
    """Compile, and compare with the reference on a probe; a warning says why where it fails."""
    probe = _probe(dtype, block_size)
    data, scale_inv = reference_cast(probe, block_size, "pow2")
    result = QuantizedTensor(
        torch.empty_like(data), torch.empty_like(scale_inv), block_size, "pow2"
    )
    try:
        _cast(probe, result)
    except _compiler_errors() as error:
        return _warn(_reason(error))
    if torch.equal(result.scale_inv, scale_inv) and torch.equal(
        result.data.view(torch.uint8), data.view(torch.uint8)
    ):
        return True
    return _warn(f"its {dtype} code in blocks of {block_size} is not equal to the reference")


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]


@cache
def _warn(reason: str) -> Literal[False]:
    """Warn, once for each reason: all dtypes and block sizes share that of a missing compiler."""
    warnings.warn(
        "fp8rl quantizes without a compiler, some four times slower, with the same result: "
        f"torch.compile does not work here ({reason})",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _probe(dtype: torch.dtype, block_size: tuple[int, int]) -> Tensor:
    """Blocks of magnitudes from denormal to huge, of both signs, with zeros and zero blocks."""
    (bn, bk), generator = block_size, torch.Generator().manual_seed(0)
    rows, columns = 16 * bn, 4 * bk
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x[::3, ::5] = 0.0
    x[1::3, ::7] = -0.0
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    low, high = torch.tensor([smallest / 64, largest / 8], dtype=torch.float64).log2().tolist()
    size = 2.0 ** torch.linspace(low, high, 16, dtype=torch.float64).repeat_interleave(bn)
    x = (x * size[:, None]).clamp(-largest, largest)
    x[:, bk : 2 * bk] = 0.0
    return x.to(dtype)
