"""The cast written again from its definition, in float64 NumPy, sharing no code with fp8rl."""

import itertools
import math

import numpy as np


def _e4m3_values() -> np.ndarray:
    """Values of codes 0..126 (sign clear, 127 is NaN): 4 exponent bits of bias 7, 3 of mantissa."""
    values = [m * 2.0**-9 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(values[:127])


E4M3 = _e4m3_values()


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """Nearest code of each float64, ties to the even code, beyond 448 the code of 448."""
    magnitude = np.abs(x)
    above = np.searchsorted(E4M3, magnitude).clip(1, 126)
    low, high = E4M3[above - 1], E4M3[above]
    middle = (low + high) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    return (np.where(up, above, above - 1) + 128 * np.signbit(x)).astype(np.uint8)


def pow2_scale_inv(amax: float) -> float:
    """Smallest 2^k with amax <= 448 * 2^k, by search from the definition; k >= -126."""
    k = -126
    while amax > math.ldexp(448.0, k):
        k += 1
    return math.ldexp(1.0, k)


def quantize_matrix(
    x: np.ndarray, block: tuple[int, int], scale_format: str
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8) and scale_inv (float32) of a float32 matrix."""
    (n, k), (bn, bk) = x.shape, block
    codes = np.zeros((n, k), np.uint8)
    scales = np.zeros((math.ceil(n / bn), math.ceil(k / bk)), np.float32)
    for i, j in itertools.product(*map(range, scales.shape)):
        here = np.s_[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk]
        part = x[here].astype(np.float64)
        amax = np.abs(part).max()
        if amax == 0:
            scales[i, j], scaled = 1.0, part
        elif scale_format == "pow2":
            scales[i, j] = pow2_scale_inv(amax)
            scaled = part / float(scales[i, j])
        else:
            scale = np.float32(min(448.0 / amax, 2.0**126))
            scales[i, j] = np.float32(1.0 / np.float64(scale))
            scaled = np.float32(part * np.float64(scale)).astype(np.float64)
        codes[here] = e4m3_codes(scaled)
    return codes, scales


def quantize_mx(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and E8M0 bytes (both uint8) of a float32 matrix: groups of 32, exponents rounded up."""
    n, k = x.shape
    codes = np.zeros((n, k), np.uint8)
    scales = np.zeros((n, math.ceil(k / 32)), np.uint8)
    for i, j in itertools.product(*map(range, scales.shape)):
        here = np.s_[i, j * 32 : (j + 1) * 32]
        part = x[here].astype(np.float64)
        exponent = -127
        while np.abs(part).max() > math.ldexp(448.0, exponent):
            exponent += 1
        scales[i, j] = exponent + 127
        codes[here] = e4m3_codes(part / math.ldexp(1.0, exponent))
    return codes, scales
