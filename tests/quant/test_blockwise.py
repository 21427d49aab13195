"""The reference cast against the float64 oracle, and the cases that the contract names."""

import math
import pickle
import re
from functools import partial

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
from .samples import DTYPES, assert_same, codes, quantize, spread, tensors

FORMATS = ("pow2", "fp32")


def assert_is_oracle(x: torch.Tensor, q: QuantizedTensor) -> None:
    matrices = x.float().reshape(-1, *x.shape[-2:]).numpy()
    data = codes(q).reshape(matrices.shape)
    scales = q.scale_inv.reshape(-1, *q.scale_inv.shape[-2:]).numpy()
    for matrix, found_codes, found_scales in zip(matrices, data, scales, strict=True):
        want_codes, want_scales = quantize_matrix(matrix, q.block_size, q.scale_format)
        assert np.array_equal(found_scales, want_scales)
        assert np.array_equal(found_codes, want_codes)


@settings(max_examples=150, deadline=None)
@given(
    tensors(),
    st.sampled_from(FORMATS),
    st.sampled_from([(16, 16), (1, 16), (16, 1), (5, 7), (128, 128)]),
)
def test_every_tensor_is_quantized_as_the_definition_says(x, scale_format, block_size):
    before = x.clone()
    q = quantize(x, block_size=block_size, scale_format=scale_format)
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
    assert_is_oracle(x, quantize(x, scale_format=scale_format))


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
    assert_is_oracle(x, quantize(x, block_size=(1, 2), scale_format=scale_format))


def test_pow2_scale_steps_up_only_above_448():
    k = torch.arange(-126, 120)
    at = torch.ldexp(torch.full(k.shape, 448.0), k)[:, None]
    above = torch.nextafter(at, torch.tensor(math.inf))
    scales = torch.ldexp(torch.ones(k.shape), k)[:, None]
    assert torch.equal(quantize(at, block_size=(1, 1)).scale_inv, scales)
    assert torch.equal(quantize(above, block_size=(1, 1)).scale_inv, 2 * scales)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-38, 2.0**-126])
def test_the_smallest_magnitudes_have_a_normal_scale(amax, scale_format):
    q = quantize(torch.tensor([[amax, 0.0]]), scale_format=scale_format)
    assert q.scale_inv.item() == 2.0**-126
    assert dequantize_blockwise(q, torch.float32)[0, 0].item() <= amax * 1.0625


@pytest.mark.parametrize("scale_format", FORMATS)
def test_a_zero_block_has_scale_one_and_data_zero(scale_format):
    x = torch.ones(4, 4)
    x[:2, :2] = 0.0
    q = quantize(x, block_size=(2, 2), scale_format=scale_format)
    assert q.scale_inv[0, 0].item() == 1.0
    assert not codes(q)[:2, :2].any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_an_empty_tensor_gives_an_empty_result(shape, scale_format):
    q = quantize(torch.empty(shape), block_size=(2, 2), scale_format=scale_format)
    assert q.shape == shape
    assert q.scale_inv.shape == (*shape[:-2], math.ceil(shape[-2] / 2), math.ceil(shape[-1] / 2))
    assert dequantize_blockwise(q).shape == shape


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(FORMATS), st.integers(1, 2))
def test_shards_cut_between_blocks_join_to_the_whole(x, scale_format, at):
    cast = partial(quantize, block_size=(16, 16), scale_format=scale_format)
    whole = cast(x)
    for dim in (-2, -1):
        cut = min(at * 16, x.shape[dim])
        parts = [cast(p) for p in x.split([cut, x.shape[dim] - cut], dim=dim)]
        data = torch.cat([p.data.view(torch.uint8) for p in parts], dim=dim)
        assert np.array_equal(data.numpy(), codes(whole))
        assert torch.equal(torch.cat([p.scale_inv for p in parts], dim=dim), whole.scale_inv)


def test_each_expert_is_quantized_alone():
    x = torch.stack([torch.randn(130, 130) * 10.0**e for e in range(-3, 3)])
    stacked = quantize(x)
    for index, expert in enumerate(x):
        alone = quantize(expert)
        assert_same(
            QuantizedTensor(stacked.data[index], stacked.scale_inv[index], (128, 128), "pow2"),
            alone,
        )


def test_strides_and_gradients_make_no_difference():
    x = torch.randn(40, 24).t()
    assert_same(
        quantize(x.requires_grad_(), block_size=(16, 16)),
        quantize(x.detach().contiguous(), block_size=(16, 16)),
    )


def test_pow2_values_survive_bfloat16():
    q = quantize(torch.randn(256, 256) * 0.02)
    assert torch.equal(
        dequantize_blockwise(q).float(), dequantize_blockwise(q, dtype=torch.float32)
    )


def test_dequantizing_multiplies_each_element_by_the_scale_of_its_block():
    q = quantize(spread((2, 10, 13), 3, -20, 20), block_size=(4, 5), scale_format="fp32")
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
        quantize(x, scale_format=scale_format, name="model.w")
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
        (lambda: quantize(x[None, None]), r"\[N, K\] or \[E, N, K\]"),
        (lambda: quantize(x.double(), name="w"), "w: dtype must be one of"),
        (lambda: quantize(x, block_size=(0, 4)), "two positive integers"),
        (lambda: quantize_activations(x, group_size=-1), "two positive integers"),
        (lambda: quantize_activations(x[0]), r"\[\.\., T, K\]"),
        (lambda: dequantize_blockwise(quantize(x), torch.float64), "dtype must be"),
    ]:
        with refusal(QuantFormatError, message) as found:
            call()
        assert str(found.value)


def test_an_fp32_weight_is_quantized_as_master_or_as_its_bf16_export_and_never_unsaid():
    x = spread((130, 200), 7, -8, 8)
    export = quantize_blockwise(x, fp32_as="export")
    assert_same(export, quantize_blockwise(x.bfloat16()))
    assert_is_oracle(x, quantize_blockwise(x, fp32_as="master"))
    assert (codes(export) != codes(quantize_blockwise(x, fp32_as="master"))).any()
    with pytest.raises(QuantFormatError, match=r"w: is fp32.*'master'.*or 'export'.*different"):
        quantize_blockwise(x, name="w")
    with refusal(QuantFormatError, "fp32_as is 'bf16'"):
        quantize_blockwise(x, fp32_as="bf16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_fp32_stands_for_makes_no_difference_to_other_types(dtype):
    x = spread((130, 200), 7, -8, 8).to(dtype)
    for choice in ("master", "export"):
        assert_same(quantize_blockwise(x, fp32_as=choice), quantize_blockwise(x))


def test_an_export_that_overflows_bf16_is_not_finite():
    x = torch.tensor([[1.0, float(np.finfo(np.float32).max)]])
    assert quantize_blockwise(x, fp32_as="master").data.float().tolist() == [[0.0, 256.0]]
    with pytest.raises(NonFiniteWeightError, match=r"1 non-finite .* \[0, 1\]"):
        quantize_blockwise(x, fp32_as="export")


def test_an_unknown_scale_format_is_refused():
    q = quantize(torch.zeros(4, 4))
    with refusal(QuantFormatError, "one of .*found 'e8m0'") as found:
        QuantizedTensor(q.data, q.scale_inv, (128, 128), "e8m0")
    assert "e8m0" in str(found.value)


def test_a_quantized_tensor_knows_its_size_and_refuses_parts_that_do_not_fit():
    q = quantize(torch.ones(130, 129))
    assert q.shape == (130, 129)
    assert q.nbytes == 130 * 129 + 4 * 4
    with refusal(QuantFormatError, r"must have shape \(2, 2\), found \(1, 2\)"):
        QuantizedTensor(q.data, q.scale_inv[:1], (128, 128), "pow2")
    with refusal(QuantFormatError, r"data must be torch.float8_e4m3fn"):
        QuantizedTensor(q.data.float(), q.scale_inv, (128, 128), "pow2")
    with refusal(QuantFormatError, r"data must be \[\.\., N, K\]"):
        QuantizedTensor(q.data[0], q.scale_inv[0], (128, 128), "pow2")


def test_what_was_found_in_a_weight_reaches_another_process():
    with pytest.raises(NonFiniteWeightError) as caught:
        quantize(torch.tensor([[1.0, math.nan], [2.0, 3.0]]), name="a.weight")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is NonFiniteWeightError and str(again) == str(caught.value)
    assert (again.name, again.count, again.first_index) == ("a.weight", 1, (0, 1))
