"""What changed between two tensors of one size, exactly: positions and differences, compressed.

A tensor is a row of elements of ``width`` bytes: 1 for FP8 codes, 2 for BF16 (and for fp32, as its
halves). It is cut into frames of 2 MiB, each encoded alone, so that memory stays bounded, positions
fit 32 bits, and a dense stretch costs nothing elsewhere:

    header    magic, format, width; bytes of the tensor; bytes of all frames      22 bytes
    frame     large changed elements; bytes of the differences                       8 bytes
              of BF16 also: small changed elements, and their bound                  6 bytes
      small         positions among the elements of the base below the bound, Elias-Fano
      large         positions of the others among all elements, Elias-Fano (elias_fano.py)
      differences   first of the small, then of the large: new - old modulo 2^(8 width), as zigzag
                    (-1 1 -2 2 .. -> 1 2 3 4 ..); all low bytes, then all high bytes; one zlib
                    stream (Huffman codes and runs)

A weight that moves a little goes to a neighbouring code, so a difference takes one to two bits, and
its high byte, nearly always zero, none. At 0.23 % changed FP8 codes that is 0.17 % of the tensor's
BF16 bytes. Positions take most of it. Small weights have finer codes and so move more often: half
of all changes in BF16 are among the smallest few percent of the elements, so the bound is the
median magnitude of what changed, which saves a seventh. In FP8 it would save about as much, and is
not done (all count as large): finding the small ones is a scan of every code, on both sides.

Comparing runs on all threads; what changed costs some ten nanoseconds an element to encode
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
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
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
FORMAT: Final = 2
HEADER: Final = struct.Struct("<4sBBQQ")
FRAME_HEADER: Final = {1: struct.Struct("<II"), 2: struct.Struct("<IIIH")}  # by width
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}
_MAGNITUDE: Final = np.uint16(0x7FFF)  # of a BF16 element: all but its sign
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
    encode = partial(_encode_frame, width=width)
    for frame in _threads().map(encode, torch.split(base, FRAME), torch.split(new, FRAME)):
        if room <= 0:
            return None
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
        for _ in _changes(data, base, width):
            pass
        if out.data_ptr() != base.data_ptr():
            out.copy_(base)
    elements = out.numpy().view(_UNSIGNED[width])
    for change in _changes(data, base, width):
        here = elements[change.start : change.start + FRAME // width]
        here[change.positions] += change.differences
    return out


@cache
def _threads() -> ThreadPoolExecutor:
    """NumPy and zlib let other threads run while they work."""
    return ThreadPoolExecutor(torch.get_num_threads(), "fp8rl-delta")


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
        return [bytes(FRAME_HEADER[width].size)]
    base = old.numpy().view(_UNSIGNED[width])
    bound, small = _split(base[positions]) if width == 2 else (0, np.zeros(len(positions), bool))
    values = _compress(np.concatenate([differences[small], differences[~small]]), width)
    few = int(small.sum())
    split = (few, bound) if width == 2 else ()
    header = FRAME_HEADER[width].pack(len(positions) - few, len(values), *split)
    candidates = _below(base, bound)
    among = np.searchsorted(candidates, positions[small]).astype(np.uint32)
    parts = ((among, len(candidates)), (positions[~small], len(base)))
    return [header, *(encode_positions(*part) for part in parts if len(part[0])), values]


def _split(changed: Elements) -> tuple[int, npt.NDArray[np.bool_]]:
    """The bound for BF16 elements that changed, by what they were, and which lie below it."""
    magnitudes = changed & _MAGNITUDE
    bound = int(np.median(magnitudes))
    small = magnitudes < bound
    return (bound if small.any() else 0), small


def _below(elements: Elements, bound: int) -> npt.NDArray[np.int64]:
    """Positions of the elements whose magnitude is below the bound; none where that is 0."""
    if bound == 0:
        return np.empty(0, np.int64)
    return np.flatnonzero((elements & _MAGNITUDE) < bound)


def _changed(old: Tensor, now: Tensor, width: int) -> tuple[Positions, Elements]:
    """The elements that differ, and by what: found among those of the words of 8 bytes that do."""
    was, is_now = _words(old).numpy(), _words(now).numpy()
    words = np.flatnonzero(was != is_now)
    before, after = (each[words].view(_UNSIGNED[width]) for each in (was, is_now))
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


def _changes(data: Bytes, base: Tensor, width: int) -> Iterator[_Change]:
    """Decode frame after frame; DeltaError at the first that is not good.

    A frame of ``base`` may be written to once its change was taken.
    """
    at = HEADER.size
    for start in range(0, base.numel(), FRAME):
        old = base[start : start + FRAME].numpy().view(_UNSIGNED[width])
        try:
            change, at = _decode_frame(data, at, old, width)
        except DeltaError as error:
            raise DeltaError(f"frame at byte {start}: {error}") from error
        if change is not None:
            yield _Change(start // width, *change)
    if at != len(data):
        raise DeltaError(f"payload has {len(data) - at} bytes after its last frame, expected none")


def _decode_frame(
    data: Bytes, at: int, old: Elements, width: int
) -> tuple[tuple[Positions, Elements] | None, int]:
    """What changed in the frame that begins at byte ``at``, and where the next one begins."""
    header = FRAME_HEADER[width]
    if at + header.size > len(data):
        raise DeltaError("the payload ends before it")
    many, packed, *rest = header.unpack_from(data.data, at)
    few, bound = rest or (0, 0)
    at += header.size
    if bool(few) != bool(bound):
        raise DeltaError(f"{few} changed elements below {bound}, expected both zero or neither")
    candidates = _below(old, bound)
    if few > len(candidates) or many > len(old) - len(candidates):
        raise DeltaError(
            f"{few} changed elements below {bound} and {many} others, expected at most "
            f"{len(candidates)} and {len(old) - len(candidates)}"
        )
    if few + many == 0:
        if packed:
            raise DeltaError(f"differences of {packed} bytes, expected no differences of none")
        return None, at
    middle = at + (encoded_size(few, len(candidates)) if few else 0)
    last = middle + (encoded_size(many, len(old)) if many else 0)
    end = last + packed
    if end > len(data):
        raise DeltaError(f"ends at byte {end} of a payload of {len(data)} bytes")
    positions = np.empty(few + many, np.uint32)
    if few:
        positions[:few] = candidates[decode_positions(data[at:middle], few, len(candidates))]
    if many:
        positions[few:] = decode_positions(data[middle:last], many, len(old))
        if bound and bool(((old[positions[few:]] & _MAGNITUDE) < bound).any()):
            raise DeltaError(f"positions: found an element below {bound} among the large ones")
    return (positions, _decompress(data[last:end], few + many, width)), end
