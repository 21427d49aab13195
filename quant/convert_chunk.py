"""A conversion in chunks: some hundred thousand elements each, independent of one another.

A chunk of a quantized or dequantized tensor is some whole rows of blocks of one matrix; of another
tensor, a run of elements. Where it is read and written follows from the plan alone, so chunk number
i is the same one in every run, and "the first i are done" says all about how far a conversion is.

Every value that passes is checked: NaN or Inf, in a tensor that is only copied too, is an error.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fp8rl.quant.blockwise import FP32Source, dequantize_blockwise, quantize_blockwise
from fp8rl.quant.checkpoint_errors import ErrorSums, error_sums
from fp8rl.quant.checkpoint_file import StoredTensor, read_into
from fp8rl.quant.checkpoint_writer import FileLayout
from fp8rl.quant.convert_plan import Part
from fp8rl.quant.errors import CheckpointFormatError, NonFiniteWeightError
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor, scale_shape

CHUNK: Final = 2**19  # elements; 1 MiB of bf16, too little for a compiler to be woken

Block = tuple[int, int]


class Span(NamedTuple):
    """Some bytes of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Chunk:
    """A piece of a part: [rows, K] of a matrix, or [elements].

    first: elements of the tensor before it. first_scale: blocks of the tensor before it.
    """

    part: Part
    block_size: Block
    shape: tuple[int, ...]
    first: int
    first_scale: int

    @property
    def scales(self) -> tuple[int, int]:
        """Shape of its scales, where it has some."""
        rows, columns = scale_shape(self.shape, self.block_size)
        return rows, columns

    @property
    def reads(self) -> list[Span]:
        """Where its values are, and then the scales of what is to be dequantized."""
        source, scale = self.part.source, self.part.scale
        spans = [_span(source, self.first, math.prod(self.shape))]
        if scale is not None:
            spans.append(_span(scale, self.first_scale, math.prod(self.scales)))
        return spans

    @property
    def nbytes(self) -> int:
        """Bytes that it reads."""
        return sum(span.nbytes for span in self.reads)

    def offsets(self, layout: FileLayout) -> list[int]:
        """Where each output begins in the file that `layout` describes."""
        data, *scales = self.part.outputs
        offsets = [layout.offsets[data.name] + self.first * data.dtype.itemsize]
        for scale in scales:
            first = layout.offsets[scale.name]
            offsets.append(first + self.first_scale * scale.dtype.itemsize)
        return offsets


def chunks_of(part: Part, block_size: Block) -> Iterator[Chunk]:
    """All chunks of a part, in the order of the source; none of an empty tensor."""
    shape = part.source.shape
    elements = math.prod(shape)
    if part.action in ("copy", "round"):
        for first in range(0, elements, CHUNK):
            yield Chunk(part, block_size, (min(CHUNK, elements - first),), first, 0)
        return
    if not elements:
        return
    n, k = shape[-2:]
    step = max(CHUNK // k // block_size[0], 1) * block_size[0]
    block_rows, block_columns = scale_shape((n, k), block_size)
    for matrix in range(elements // (n * k)):
        for row in range(0, n, step):
            scale_row = matrix * block_rows + row // block_size[0]
            rows = min(step, n - row)
            first = (matrix * n + row) * k
            yield Chunk(part, block_size, (rows, k), first, scale_row * block_columns)


def read_chunk(chunk: Chunk) -> list[bytearray]:
    """Read what a chunk is made from, one buffer for each of its `reads`; any thread may."""
    buffers = []
    for span in chunk.reads:
        buffer = bytearray(span.nbytes)
        read_into(span.path, span.offset, memoryview(buffer))
        buffers.append(buffer)
    return buffers


def convert_chunk(
    chunk: Chunk, inputs: list[bytearray], fp32_as: FP32Source | None, *, measure: bool
) -> tuple[list[bytearray], ErrorSums | None]:
    """Return what to write, a buffer for each of the part's outputs, and the error if measured.

    Raises NonFiniteWeightError; where a tensor is dequantized to NaN or Inf, CheckpointFormatError.
    """
    part, x = chunk.part, _values(chunk, inputs)
    if part.action == "quantize":
        return _quantize(chunk, x, fp32_as, measure=measure)
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise _non_finite(chunk)
    if part.action == "copy":
        return inputs, None
    output = bytearray(x.numel() * torch.bfloat16.itemsize)
    torch.frombuffer(output, dtype=torch.bfloat16).view(x.shape).copy_(x)
    return [output], None


def _quantize(
    chunk: Chunk, x: Tensor, fp32_as: FP32Source | None, *, measure: bool
) -> tuple[list[bytearray], ErrorSums | None]:
    scales = chunk.scales
    outputs = [bytearray(x.numel()), bytearray(math.prod(scales) * torch.float32.itemsize)]
    q = QuantizedTensor(
        torch.frombuffer(outputs[0], dtype=FP8_DTYPE).view(x.shape),
        torch.frombuffer(outputs[1], dtype=torch.float32).view(scales),
        chunk.block_size,
        "pow2",
    )
    name = chunk.part.source.name
    try:
        quantize_blockwise(x, block_size=chunk.block_size, name=name, fp32_as=fp32_as, out=q)
    except NonFiniteWeightError as error:
        raise _non_finite(chunk) from error
    return outputs, error_sums(x, q) if measure else None


def _values(chunk: Chunk, inputs: list[bytearray]) -> Tensor:
    """The values of a chunk: those in its file, or what they dequantize to."""
    source, scale = chunk.part.source, chunk.part.scale
    values = torch.frombuffer(inputs[0], dtype=source.dtype).view(chunk.shape)
    if scale is None:
        return values
    scales = torch.frombuffer(inputs[1], dtype=scale.dtype).float().view(chunk.scales)
    return dequantize_blockwise(QuantizedTensor(values, scales, chunk.block_size, "fp32"))


def _non_finite(chunk: Chunk) -> NonFiniteWeightError | CheckpointFormatError:
    """The error for the tensor of a chunk with NaN or Inf in it; reads all of the tensor again."""
    part, source = chunk.part, chunk.part.source
    count, first, found = 0, 0, math.nan
    for piece in chunks_of(part, chunk.block_size):
        values = _values(piece, read_chunk(piece)).flatten()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad) and not count:
            first, found = piece.first + int(bad[0]), float(values[bad[0]])
        count += len(bad)
    where: list[int] = []
    for size in reversed(source.shape):
        first, index = divmod(first, size)
        where.insert(0, index)
    if part.action != "dequantize":
        name = f"{source.path}: tensor {source.name!r}"
        return NonFiniteWeightError(name, count, tuple(where), found)
    return CheckpointFormatError(
        f"{source.path}: tensor {source.name!r} dequantizes to {count} non-finite element(s), the "
        f"first at index {where} ({found}); the checkpoint is damaged, or was made from a broken "
        "model"
    )


def _span(tensor: StoredTensor, first: int, count: int) -> Span:
    size = tensor.dtype.itemsize
    return Span(tensor.path, tensor.offset + first * size, count * size)
