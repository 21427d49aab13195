"""Rising positions in about two bits more than their entropy needs: Elias-Fano, in NumPy.

n positions below m; each is split at bit k = floor(log2(m / n)):

    high    a one for each position, at bit (position >> k) + its number: unary gaps, n + m / 2^k
    low     the k bits below, one position after the other                        n k bits

together n (2 + log2(m / n)) bits at most, where the entropy is about n (1.44 + log2(m / n)). There
is one encoding of a list: k follows from n and m, and the bits that fill up a byte are zero.

Source: P. Elias, Efficient storage and retrieval by content and address of static files (1974).
Left out: access to single positions, for which this code is known; everything here is decoded.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fp8rl.sync.errors import DeltaError

Positions: TypeAlias = npt.NDArray[np.uint32]
Bytes: TypeAlias = npt.NDArray[np.uint8]


def encoded_size(count: int, universe: int) -> int:
    """Bytes that ``count`` (at least 1) positions below ``universe`` take."""
    high, low = _bits(count, universe)
    return -(-high // 8) - (-low // 8)


def encode_positions(positions: Positions, universe: int) -> bytes:
    """Encode one or more strictly rising positions below ``universe``, itself below 2^32."""
    k, (length, _) = _low_bits(len(positions), universe), _bits(len(positions), universe)
    high = np.zeros(length, bool)
    high[(positions >> k) + np.arange(len(positions), dtype=np.uint32)] = True
    low = (positions[:, None] >> np.arange(k, dtype=np.uint32)) & 1
    packed = (np.packbits(bits, bitorder="little") for bits in (high, low.astype(bool)))
    return b"".join(part.tobytes() for part in packed)


def decode_positions(data: Bytes, count: int, universe: int) -> Positions:
    """Decode ``count`` (at least 1) positions from the ``encoded_size`` bytes that they take.

    Raises DeltaError for anything that ``encode_positions`` does not make.
    """
    k, (length, low_length) = _low_bits(count, universe), _bits(count, universe)
    ends = -(-length // 8)
    high = np.unpackbits(data[:ends], bitorder="little")
    low = np.unpackbits(data[ends:], bitorder="little")
    if high[length:].any() or low[low_length:].any():
        raise DeltaError("positions: bits after the last one are set, expected zeros")
    ones = np.flatnonzero(high)
    if len(ones) != count:
        raise DeltaError(f"positions: found {len(ones)}, expected {count}")
    weights = np.uint32(1) << np.arange(k, dtype=np.uint32)
    above = (ones - np.arange(count)).astype(np.uint32) << np.uint32(k)
    positions: Positions = above | (low[:low_length].reshape(count, k) @ weights)
    if not (positions[1:] > positions[:-1]).all():
        raise DeltaError("positions: found some that do not rise")
    if positions[-1] >= universe:
        raise DeltaError(f"positions: found {positions[-1]}, expected all below {universe}")
    return positions


def _low_bits(count: int, universe: int) -> int:
    return max((universe // count).bit_length() - 1, 0)


def _bits(count: int, universe: int) -> tuple[int, int]:
    """Bits of the high part and of the low."""
    k = _low_bits(count, universe)
    return count + ((universe - 1) >> k), count * k
