"""Dequantizing and quantizing again in pow2: no value changes, and a byte in one case alone.

The case: a block whose largest code is exactly 224 (an amax in (224, 232] times a power of two).
The same values fit at half the scale, under other codes; from then on no byte changes either.
"""

import numpy as np
import torch
from hypothesis import given, settings

from fp8rl.quant import QuantizedTensor, dequantize_blockwise

from .samples import assert_same, codes, quantize, tensors


def below_overflow(x: torch.Tensor) -> torch.Tensor:
    """Magnitudes that do not round up to 2^128, which fp32 lacks."""
    return x.float().clamp(-3.2e38, 3.2e38)


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_requantizing_a_dequantized_pow2_tensor_changes_no_value(x):
    first = quantize(below_overflow(x), block_size=(8, 8))
    values = dequantize_blockwise(first, torch.float32)
    second = quantize(values, block_size=(8, 8))
    assert torch.equal(dequantize_blockwise(second, torch.float32), values)
    third = quantize(dequantize_blockwise(second, torch.float32), block_size=(8, 8))
    assert_same(second, third)


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_requantizing_changes_a_byte_only_where_the_largest_code_is_224_or_0(x):
    first = quantize(below_overflow(x), block_size=(8, 8))
    second = quantize(dequantize_blockwise(first, torch.float32), block_size=(8, 8))
    values = QuantizedTensor(
        first.data, torch.ones_like(first.scale_inv), first.block_size, first.scale_format
    )
    code_amax = quantize_amax(dequantize_blockwise(values, torch.float32), 8)
    small = first.scale_inv == 2.0**-126  # no smaller scale exists
    halved = (code_amax == 224) & ~small
    vanished = code_amax == 0
    want = torch.where(halved, first.scale_inv / 2, first.scale_inv)
    want = torch.where(vanished, torch.ones_like(want), want)
    assert torch.equal(second.scale_inv, want)
    moved = torch.from_numpy((codes(first) != codes(second)).astype(np.float32))
    assert not (quantize_amax(moved, 8).bool() & ~halved).any()


def quantize_amax(x: torch.Tensor, block: int) -> torch.Tensor:
    """Largest magnitude of each block, by a pooling that shares no code with the cast."""
    planes = x.abs().reshape(-1, 1, *x.shape[-2:])
    pooled = torch.nn.functional.max_pool2d(planes, block, ceil_mode=True)
    return pooled.reshape(*x.shape[:-2], *pooled.shape[-2:])


def all_bfloat16(low: float, high: float) -> torch.Tensor:
    """Every positive bf16 value in [low, high], as a column."""
    x = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    return x[(x >= low) & (x <= high)][:, None]


def test_requantizing_changes_the_bytes_of_an_amax_in_224_to_232_times_a_power_of_two_alone():
    """For every bf16 amax; below 2^-118 no smaller scale exists, and what rounds to 0 has 1.0."""
    x = all_bfloat16(0.0, 3.2e38)
    first = quantize(x, block_size=(1, 1))
    again = quantize(dequantize_blockwise(first, torch.float32), block_size=(1, 1))
    assert torch.equal(
        dequantize_blockwise(again, torch.float32), dequantize_blockwise(first, torch.float32)
    )
    changed = (first.data.view(torch.uint8) != again.data.view(torch.uint8)).flatten()
    mantissa, _ = torch.frexp(x.double().flatten())
    expected = (mantissa > 224 / 256) & (mantissa <= 232 / 256) & (x.double().flatten() > 2.0**-118)
    assert torch.equal(changed, expected)
    rounded_to_0 = x.flatten() <= 2.0**-136  # half of the smallest code at the smallest scale
    moved = (first.scale_inv != again.scale_inv).flatten()
    assert torch.equal(moved, expected | rounded_to_0)


def test_a_largest_code_of_224_moves_to_half_the_scale():
    q = quantize(torch.tensor([[225.0, 1.0]]))
    again = quantize(dequantize_blockwise(q))
    assert (q.scale_inv.item(), q.data.float().tolist()) == (1.0, [[224.0, 1.0]])
    assert (again.scale_inv.item(), again.data.float().tolist()) == (0.5, [[448.0, 2.0]])
