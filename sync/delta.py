"""What changed between two tensors of one size, exactly: positions and differences, compressed.

A tensor is a row of elements of ``width`` bytes: 1 for FP8 codes, 2 for BF16 (and for fp32, as its
halves). It is cut into frames of 2 MiB, each encoded alone, so that memory stays bounded, positions
fit 32 bits, and a dense stretch costs nothing elsewhere:

    header    magic, format, width; bytes of the tensor; bytes of all frames      22 bytes
    frame     changed elements; bytes of their differences                         8 bytes
      positions     Elias-Fano (elias_fano.py)
      differences   new - old modulo 2^(8 width), as zigzag (-1 1 -2 2 .. -> 1 2 3 4 ..); all low
                    bytes, then all high bytes; one zlib stream (Huffman codes and runs)

A weight that moves a little goes to a neighbouring code, so a difference takes one to two bits, and
its high byte, nearly always zero, none. At 0.23 % changed FP8 codes that is 0.17 % of the tensor's
BF16 bytes. Positions take most of it. Small weights have finer codes and so move more often; coding
positions by the old code's exponent would save about a third, at several times the work.

Comparing runs at the speed of memory; what changed costs some ten nanoseconds an element to encode
or apply. Tensors that have little in common take long: the differences go through zlib (100 MB/s)
before it is known that whole bytes are smaller.

Nothing in a payload is believed: sizes are bounded by the tensor's own before anything is decoded,
and memory is written to in place only after all frames have been decoded once. A delta does not
know its base: applied to another tensor of the same size it gives nonsense, which a digest of the
result must tell.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.sync.elias_fano import (
    Bytes,
    Positions,
    decode_positions,
    encode_positions,
    encoded_size,
)
from fp8rl.sync.errors import DeltaError

Width = Literal[1, 2]
Elements: TypeAlias = npt.NDArray[Any]  # uint8 or uint16

FRAME: Final = 2**21  # bytes of the tensor; a multiple of 8
MAGIC: Final = b"FP8D"
FORMAT: Final = 1
HEADER: Final = struct.Struct("<4sBBQQ")
FRAME_HEADER: Final = struct.Struct("<II")
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}
_SIGNED: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("<i1"), 2: np.dtype("<i2")}


def encode_delta(
    base: UInt8[Tensor, " n"], new: UInt8[Tensor, " m"], *, width: Width = 1
) -> UInt8[Tensor, " payload"] | None:
    """Encode how ``new`` differs from ``base``; None where its whole bytes are no larger.

    Both are contiguous, on the CPU, and n = m bytes long, a multiple of ``width``, the bytes of an
    element. Raises DeltaError where they are not.
    """
    _check(base, "base")
    _check(new, "new")
    if base.numel() != new.numel() or base.numel() % width:
        raise DeltaError(
            f"base has {base.numel()} bytes and new {new.numel()}; expected as many, and whole "
            f"elements of {width} byte(s)"
        )
    parts: list[bytes] = []
    room = base.numel() - HEADER.size
    for old, now in zip(torch.split(base, FRAME), torch.split(new, FRAME), strict=True):
        if room <= 0:
            return None
        frame = _encode_frame(old, now, width)
        room -= sum(map(len, frame))
        parts += frame
    if room <= 0:
        return None
    body = sum(map(len, parts))
    header = HEADER.pack(MAGIC, FORMAT, width, base.numel(), body)
    return torch.frombuffer(bytearray(b"".join((header, *parts))), dtype=torch.uint8)


def apply_delta(
    base: UInt8[Tensor, " n"],
    payload: UInt8[Tensor, " payload"],
    *,
    out: UInt8[Tensor, " n"] | None = None,
) -> UInt8[Tensor, " n"]:
    """Return the tensor whose difference from ``base`` is ``payload``; in ``out`` if it is given.

    All are contiguous and on the CPU. ``out`` may be ``base`` itself, and else shares no memory
    with it. It is not written to before the whole payload, which must not change meanwhile, has
    been found good.

    Raises DeltaError for a payload that is no delta of a tensor of this size.
    """
    _check(base, "base")
    _check(payload, "payload")
    if out is not None:
        _check(out, "out")
    data = payload.numpy()
    width = _read_header(data, base.numel())
    if out is None:
        out = base.clone()  # nobody sees it before it is done
    else:
        for _ in _changes(data, base.numel(), width):
            pass
        if out.data_ptr() != base.data_ptr():
            out.copy_(base)
    elements = out.numpy().view(_UNSIGNED[width])
    for change in _changes(data, base.numel(), width):
        here = elements[change.start : change.start + FRAME // width]
        here[change.positions] += change.differences
    return out


class _Change(NamedTuple):
    """A frame that changed: its first element, and what is added to which elements after it."""

    start: int
    positions: Positions
    differences: Elements


def _check(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise DeltaError(
            f"{name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}; expected "
            "contiguous torch.uint8 on the CPU"
        )


def _encode_frame(old: Tensor, now: Tensor, width: int) -> list[bytes]:
    positions, differences = _changed(old, now, width)
    if len(positions) == 0:
        return [FRAME_HEADER.pack(0, 0)]
    values = _compress(differences, width)
    header = FRAME_HEADER.pack(len(positions), len(values))
    return [header, encode_positions(positions, old.numel() // width), values]


def _changed(old: Tensor, now: Tensor, width: int) -> tuple[Positions, Elements]:
    """The elements that differ, and by what: found among those of the words of 8 bytes that do."""
    was, is_now = _words(old), _words(now)
    differ = torch.ne(was, is_now)  # on all threads, unlike NumPy's
    words = np.flatnonzero(differ.numpy())
    before, after = (t.numpy()[words].view(_UNSIGNED[width]) for t in (was, is_now))
    differences: Elements = after - before
    found = np.flatnonzero(differences)
    per_word = 8 // width
    positions = words[found // per_word] * per_word + found % per_word
    return positions.astype(np.uint32), differences[found]


def _words(frame: Tensor) -> Tensor:
    """View as int64; a copy, filled up with zeros, where torch cannot view it."""
    if frame.numel() % 8 or frame.storage_offset() % 8:
        frame = torch.nn.functional.pad(frame, (0, -frame.numel() % 8))
    return frame.view(torch.int64)


def _compress(differences: Elements, width: int) -> bytes:
    signed = differences.view(_SIGNED[width])
    zigzag = (signed << 1) ^ (signed >> (8 * width - 1))
    planes = zigzag.view(np.uint8).reshape(-1, width).T
    packer = zlib.compressobj(strategy=zlib.Z_RLE, memLevel=9)
    return packer.compress(planes.tobytes()) + packer.flush()


def _decompress(data: Bytes, count: int, width: int) -> Elements:
    """``count`` differences; no more than they take is ever decompressed."""
    unpacker, expected = zlib.decompressobj(), count * width
    try:
        raw = unpacker.decompress(data.tobytes(), expected + 1)
    except zlib.error as error:
        raise DeltaError(f"differences: {error}") from error
    if len(raw) != expected or not unpacker.eof or unpacker.unused_data:
        more = "at least " if len(raw) > expected else ""
        end = "an end" if unpacker.eof else "no end"
        raise DeltaError(
            f"differences: found {more}{len(raw)} bytes, {end} of the stream and "
            f"{len(unpacker.unused_data)} bytes after it; expected {expected}, an end and none"
        )
    planes = np.frombuffer(raw, np.uint8).reshape(width, count)
    zigzag = np.ascontiguousarray(planes.T).view(_UNSIGNED[width]).ravel()
    if not zigzag.all():
        raise DeltaError("differences: found one that is zero, expected changed elements only")
    differences: Elements = (zigzag >> 1) ^ (0 - (zigzag & 1))
    return differences


def _read_header(data: Bytes, nbytes: int) -> int:
    """The element width of a payload whose header is that of a delta of ``nbytes`` bytes."""
    if len(data) < HEADER.size:
        raise DeltaError(f"payload has {len(data)} bytes, expected a header of {HEADER.size}")
    magic, form, width, size, body = HEADER.unpack_from(data.data)
    if magic != MAGIC or form != FORMAT:
        raise DeltaError(
            f"payload begins with {magic!r} format {form}, expected {MAGIC!r} format {FORMAT}"
        )
    if width not in _UNSIGNED or size % width:
        raise DeltaError(f"payload: elements of {width} bytes in a tensor of {size} bytes")
    if size != nbytes:
        raise DeltaError(f"payload is for a tensor of {size} bytes, and base has {nbytes}")
    if body != len(data) - HEADER.size:
        raise DeltaError(
            f"payload has {len(data)} bytes, expected {HEADER.size} + {body}: cut off, or joined "
            "with something else"
        )
    return int(width)


def _changes(data: Bytes, nbytes: int, width: int) -> Iterator[_Change]:
    """Decode frame after frame; DeltaError at the first that is not good."""
    at = HEADER.size
    for start in range(0, nbytes, FRAME):
        elements = min(FRAME, nbytes - start) // width
        if at + FRAME_HEADER.size > len(data):
            raise DeltaError(f"frame at byte {start}: the payload ends before it")
        count, packed = FRAME_HEADER.unpack_from(data.data, at)
        at += FRAME_HEADER.size
        if count > elements or (count == 0 and packed):
            raise DeltaError(
                f"frame at byte {start}: {count} changed elements with differences of {packed} "
                f"bytes, expected at most {elements} elements, and no differences of none"
            )
        if count == 0:
            continue
        middle = at + encoded_size(count, elements)
        end = middle + packed
        if end > len(data):
            raise DeltaError(
                f"frame at byte {start}: ends at byte {end} of a payload of {len(data)} bytes"
            )
        try:
            positions = decode_positions(data[at:middle], count, elements)
            differences = _decompress(data[middle:end], count, width)
        except DeltaError as error:
            raise DeltaError(f"frame at byte {start}: {error}") from error
        yield _Change(start // width, positions, differences)
        at = end
    if at != len(data):
        raise DeltaError(f"payload has {len(data) - at} bytes after its last frame, expected none")
