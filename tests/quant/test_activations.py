"""round_activations is quantize_activations and back, bit for bit; else it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8rl.quant import QuantFormatError, dequantize_blockwise, quantize_activations
from fp8rl.quant.activations import round_activations

from .refusal import refusal

INT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)
CODES = INT16.view(torch.bfloat16)[INT16.view(torch.bfloat16).isfinite()]
LEAST, MOST = 2.0**-112, 2.0**123  # of an amax that is not 0


def definition(x: Tensor) -> Tensor:
    return dequantize_blockwise(quantize_activations(x))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


@pytest.mark.parametrize("exponent", [-112, -111, -9, -8, -7, -1, 0, 7, 8, 9, 60, 121, 122])
@pytest.mark.parametrize("mantissa", [1.0, 1.75, 1.7578125, 1.9921875])
def test_every_bf16_number_rounds_as_defined_under_every_kind_of_amax(
    exponent: int, mantissa: float
) -> None:
    amax = mantissa * 2.0**exponent
    smaller = CODES[CODES.abs() <= amax]
    padded = torch.nn.functional.pad(smaller, (0, -len(smaller) % 127)).view(-1, 127)
    groups = torch.cat([padded, torch.full((len(padded), 1), amax, dtype=torch.bfloat16)], 1)
    assert torch.equal(bits(round_activations(groups)), bits(definition(groups)))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 12), zeros=st.floats(0, 1))
def test_random_activations_round_as_defined(seed: int, spread: float, zeros: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, size, kept = (torch.randn(3, 5, 256, generator=generator) for _ in range(3))
    x = (noise * torch.exp2(size * spread) * (kept.abs() > zeros)).bfloat16()
    amax = x.unflatten(-1, (-1, 128)).abs().amax(-1)
    assert bool(((amax == 0) | ((amax >= LEAST) & (amax < MOST))).all())
    assert torch.equal(bits(round_activations(x)), bits(definition(x)))


def test_it_reads_any_layout_and_leaves_its_input_alone() -> None:
    x = torch.randn(4, 6, 512).bfloat16()
    before = x.clone()
    for view in (x[:, ::2], x.transpose(0, 1), x[..., 128:384], x[0, 0]):
        expected = definition(view.reshape(-1, view.shape[-1])).view(view.shape)
        assert torch.equal(round_activations(view), expected)
    assert torch.equal(x, before)
    assert round_activations(x[:0]).shape == (0, 6, 512)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), MOST])
def test_a_group_that_has_no_scale_becomes_nan_and_its_neighbours_do_not(bad: float) -> None:
    x = torch.randn(2, 256).bfloat16()
    x[1, 130] = bad
    rounded = round_activations(x)
    assert bool(rounded[1, 128:].isnan().all())
    x[1, 128:] = 0
    rounded[1, 128:] = 0
    assert torch.equal(rounded, definition(x))


def test_another_width_is_refused() -> None:
    with pytest.raises(QuantFormatError, match=r"K a multiple of 128, found .*\(2, 100\)"):
        round_activations(torch.zeros(2, 100).bfloat16())


def test_another_dtype_is_refused() -> None:
    with refusal(QuantFormatError, r"bfloat16 \[\.\., K\]"):
        round_activations(torch.zeros(2, 128))


COMPILED = """
import torch
from fp8rl.quant.activations import round_activations
x = torch.randn(5, 256).bfloat16()
compiled = torch.compile(lambda x: round_activations(x + 1) * 2, fullgraph=True, dynamic=True)
assert torch.equal(compiled(x), round_activations(x + 1) * 2)
"""


def test_a_compiler_does_not_fuse_its_two_roundings() -> None:
    """In a process of its own: checks of annotations would be compiled too."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
