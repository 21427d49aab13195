"""The reference cast against the float64 oracle, and the cases that the contract names."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    NonFiniteActivationError,
    NonFiniteWeightError,
    QuantFormatError,
    QuantizedTensor,
    dequantize_blockwise,
    quantize_activations,
    quantize_blockwise,
)

from .oracle import E4M3, quantize_matrix
from .refusal import refusal

FORMATS = ("pow2", "fp32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(q: QuantizedTensor) -> np.ndarray:
    return q.data.view(torch.uint8).numpy()


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert np.array_equal(codes(a), codes(b))
    assert torch.equal(a.scale_inv, b.scale_inv)


def assert_is_oracle(x: torch.Tensor, q: QuantizedTensor) -> None:
    matrices = x.float().reshape(-1, *x.shape[-2:]).numpy()
    data = codes(q).reshape(matrices.shape)
    scales = q.scale_inv.reshape(-1, *q.scale_inv.shape[-2:]).numpy()
    for matrix, found_codes, found_scales in zip(matrices, data, scales, strict=True):
        want_codes, want_scales = quantize_matrix(matrix, q.block_size, q.scale_format)
        assert np.array_equal(found_scales, want_scales)
        assert np.array_equal(found_codes, want_codes)


def spread(shape: tuple[int, ...], seed: int, low: float, high: float) -> torch.Tensor:
    """Signed fp32 values with exponents all over [low, high], some of them zeros of either sign."""
    rng = np.random.default_rng(seed)
    x = np.exp2(rng.uniform(low, high, shape)) * rng.choice([-1.0, 1.0, 0.0, -0.0], shape)
    limit = float(np.finfo(np.float32).max)
    return torch.from_numpy(np.clip(x, -limit, limit).astype(np.float32))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Matrices and expert stacks of any size and magnitude, some with a zeroed corner."""
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    shape = (*lead, draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    low = draw(st.floats(-150, 126))
    x = spread(shape, draw(st.integers(0, 2**32)), low, min(low + draw(st.floats(0, 40)), 127.99))
    if draw(st.booleans()):
        x[..., :16, :16] = 0.0
    x = x.to(draw(st.sampled_from(DTYPES)))
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))


@settings(max_examples=150, deadline=None)
@given(
    tensors(),
    st.sampled_from(FORMATS),
    st.sampled_from([(16, 16), (1, 16), (16, 1), (5, 7), (128, 128)]),
)
def test_every_tensor_is_quantized_as_the_definition_says(x, scale_format, block_size):
    before = x.clone()
    q = quantize_blockwise(x, block_size=block_size, scale_format=scale_format)
    assert_is_oracle(x, q)
    assert torch.equal(x, before), "the input must not be written to"


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(FORMATS), st.sampled_from([1, 7, 16, 128]))
def test_activations_have_a_scale_for_each_token_and_group(x, scale_format, group_size):
    q = quantize_activations(x, group_size=group_size, scale_format=scale_format)
    assert q.block_size == (1, group_size)
    assert q.scale_inv.shape == (*x.shape[:-1], math.ceil(x.shape[-1] / group_size))
    assert_is_oracle(x, q)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (2, 130, 257)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size_blocks_with_ragged_edges(shape, dtype, scale_format):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    assert_is_oracle(x, quantize_blockwise(x, scale_format=scale_format))


# Every fp32 amax that could round the wrong way: 448 * 2^k and 2^k, with both neighbours.
EDGE_AMAX = np.unique(
    np.concatenate(
        [
            np.nextafter(np.float32(m * 2.0**k), np.float32(towards))
            for m in (1.0, 448.0)
            for k in range(-149, 119)
            for towards in (0.0, m * 2.0**k, np.inf)
        ]
        + [[np.float32(1e-45), np.float32(1e-38), np.finfo(np.float32).max]],
        axis=None,
    ).astype(np.float32)
)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_scales_at_powers_of_two_times_448_and_their_neighbours(scale_format):
    amax = EDGE_AMAX[EDGE_AMAX > 0]
    x = torch.from_numpy(np.stack([amax, -amax / 3], axis=1))
    assert_is_oracle(x, quantize_blockwise(x, block_size=(1, 2), scale_format=scale_format))


def test_pow2_scale_steps_up_only_above_448():
    k = torch.arange(-126, 120)
    at = torch.ldexp(torch.full(k.shape, 448.0), k)[:, None]
    above = torch.nextafter(at, torch.tensor(math.inf))
    scales = torch.ldexp(torch.ones(k.shape), k)[:, None]
    assert torch.equal(quantize_blockwise(at, block_size=(1, 1)).scale_inv, scales)
    assert torch.equal(quantize_blockwise(above, block_size=(1, 1)).scale_inv, 2 * scales)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-38, 2.0**-126])
def test_the_smallest_magnitudes_have_a_normal_scale(amax, scale_format):
    q = quantize_blockwise(torch.tensor([[amax, 0.0]]), scale_format=scale_format)
    assert q.scale_inv.item() == 2.0**-126
    assert dequantize_blockwise(q, torch.float32)[0, 0].item() <= amax * 1.0625


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_zero_block_has_scale_one_and_data_zero(scale_format):
    x = torch.ones(4, 4)
    x[:2, :2] = 0.0
    q = quantize_blockwise(x, block_size=(2, 2), scale_format=scale_format)
    assert q.scale_inv[0, 0].item() == 1.0
    assert not codes(q)[:2, :2].any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_an_empty_tensor_gives_an_empty_result(shape, scale_format):
    q = quantize_blockwise(torch.empty(shape), block_size=(2, 2), scale_format=scale_format)
    assert q.shape == shape
    assert q.scale_inv.shape == (*shape[:-2], math.ceil(shape[-2] / 2), math.ceil(shape[-1] / 2))
    assert dequantize_blockwise(q).shape == shape


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(FORMATS), st.integers(1, 2))
def test_shards_cut_between_blocks_join_to_the_whole(x, scale_format, at):
    def quantize(part: torch.Tensor) -> QuantizedTensor:
        return quantize_blockwise(part, block_size=(16, 16), scale_format=scale_format)

    whole = quantize(x)
    for dim in (-2, -1):
        cut = min(at * 16, x.shape[dim])
        parts = [quantize(p) for p in x.split([cut, x.shape[dim] - cut], dim=dim)]
        data = torch.cat([p.data.view(torch.uint8) for p in parts], dim=dim)
        assert np.array_equal(data.numpy(), codes(whole))
        assert torch.equal(torch.cat([p.scale_inv for p in parts], dim=dim), whole.scale_inv)


def test_each_expert_is_quantized_alone():
    x = torch.stack([torch.randn(130, 130) * 10.0**e for e in range(-3, 3)])
    stacked = quantize_blockwise(x)
    for index, expert in enumerate(x):
        alone = quantize_blockwise(expert)
        assert_same(
            QuantizedTensor(stacked.data[index], stacked.scale_inv[index], (128, 128), "pow2"),
            alone,
        )


def test_strides_and_gradients_make_no_difference():
    x = torch.randn(40, 24).t()
    assert_same(
        quantize_blockwise(x.requires_grad_(), block_size=(16, 16)),
        quantize_blockwise(x.detach().contiguous(), block_size=(16, 16)),
    )


def below_overflow(x: torch.Tensor) -> torch.Tensor:
    """Magnitudes that do not round up to 2^128, which fp32 lacks."""
    return x.float().clamp(-3.2e38, 3.2e38)


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_requantizing_a_dequantized_pow2_tensor_changes_no_value(x):
    first = quantize_blockwise(below_overflow(x), block_size=(8, 8))
    values = dequantize_blockwise(first, torch.float32)
    second = quantize_blockwise(values, block_size=(8, 8))
    assert torch.equal(dequantize_blockwise(second, torch.float32), values)
    third = quantize_blockwise(dequantize_blockwise(second, torch.float32), block_size=(8, 8))
    assert_same(second, third)


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_requantizing_changes_a_byte_only_where_the_largest_code_is_224_or_0(x):
    first = quantize_blockwise(below_overflow(x), block_size=(8, 8))
    second = quantize_blockwise(dequantize_blockwise(first, torch.float32), block_size=(8, 8))
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


def test_a_largest_code_of_224_moves_to_half_the_scale():
    q = quantize_blockwise(torch.tensor([[225.0, 1.0]]))
    again = quantize_blockwise(dequantize_blockwise(q))
    assert (q.scale_inv.item(), q.data.float().tolist()) == (1.0, [[224.0, 1.0]])
    assert (again.scale_inv.item(), again.data.float().tolist()) == (0.5, [[448.0, 2.0]])


def test_pow2_values_survive_bfloat16():
    q = quantize_blockwise(torch.randn(256, 256) * 0.02)
    assert torch.equal(
        dequantize_blockwise(q).float(), dequantize_blockwise(q, dtype=torch.float32)
    )


def test_dequantizing_multiplies_each_element_by_the_scale_of_its_block():
    q = quantize_blockwise(spread((2, 10, 13), 3, -20, 20), block_size=(4, 5), scale_format="fp32")
    found = dequantize_blockwise(q, torch.float32)
    for index in np.ndindex(2, 10, 13):
        e, i, j = index
        code = int(codes(q)[index])
        value = np.float32(E4M3[code & 127]) * q.scale_inv[e, i // 4, j // 5].numpy()
        assert found[index].item() == (-value if code & 128 else value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_weight_is_named_counted_and_located(bad, scale_format, dtype):
    x = torch.zeros(3, 140, 140, dtype=dtype)
    x[1, 130, 2] = x[2, 0, 139] = bad
    with pytest.raises(NonFiniteWeightError, match=re.escape("model.w: 2 non-finite")) as caught:
        quantize_blockwise(x, scale_format=scale_format, name="model.w")
    assert caught.value.count == 2
    assert caught.value.first_index == (1, 130, 2)
    assert "[1, 130, 2]" in str(caught.value)


def test_a_non_finite_activation_is_an_error():
    x = torch.zeros(2, 5)
    x[1, 3] = math.nan
    with pytest.raises(NonFiniteActivationError, match="activations: 1 non-finite"):
        quantize_activations(x)


def test_what_is_not_defined_is_refused():
    x = torch.zeros(4, 4)
    for call, message in [
        (lambda: quantize_blockwise(x[None, None]), r"\[N, K\] or \[E, N, K\]"),
        (lambda: quantize_blockwise(x.double(), name="w"), "w: dtype must be one of"),
        (lambda: quantize_blockwise(x, block_size=(0, 4)), "two positive integers"),
        (lambda: quantize_activations(x, group_size=-1), "two positive integers"),
        (lambda: quantize_activations(x[0]), r"\[\.\., T, K\]"),
        (lambda: dequantize_blockwise(quantize_blockwise(x), torch.float64), "dtype must be"),
    ]:
        with refusal(QuantFormatError, message):
            call()


def test_an_unknown_scale_format_is_refused():
    q = quantize_blockwise(torch.zeros(4, 4))
    with refusal(QuantFormatError, "one of .*found 'e8m0'"):
        QuantizedTensor(q.data, q.scale_inv, (128, 128), "e8m0")


def test_a_quantized_tensor_knows_its_size_and_refuses_parts_that_do_not_fit():
    q = quantize_blockwise(torch.ones(130, 129))
    assert q.shape == (130, 129)
    assert q.nbytes == 130 * 129 + 4 * 4
    with refusal(QuantFormatError, r"must have shape \(2, 2\), found \(1, 2\)"):
        QuantizedTensor(q.data, q.scale_inv[:1], (128, 128), "pow2")
    with refusal(QuantFormatError, r"data must be torch.float8_e4m3fn"):
        QuantizedTensor(q.data.float(), q.scale_inv, (128, 128), "pow2")
    with refusal(QuantFormatError, r"data must be \[\.\., N, K\]"):
        QuantizedTensor(q.data[0], q.scale_inv[0], (128, 128), "pow2")
