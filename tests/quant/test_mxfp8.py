"""MXFP8 against the float64 oracle and against the quantizers of vLLM and torchao."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    MXFP8Tensor,
    NonFiniteWeightError,
    QuantFormatError,
    dequantize_mxfp8,
    quantize_blockwise,
    quantize_mxfp8,
)

from .oracle import quantize_mx
from .refusal import refusal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes(q: MXFP8Tensor) -> torch.Tensor:
    return q.data.view(torch.uint8)


def assert_is_oracle(x: torch.Tensor, q: MXFP8Tensor) -> None:
    want_codes, want_scales = quantize_mx(x.float().reshape(-1, x.shape[-1]).numpy())
    assert q.scale_inv.shape == (*x.shape[:-1], math.ceil(x.shape[-1] / 32))
    assert np.array_equal(q.scale_inv.reshape(want_scales.shape).numpy(), want_scales)
    assert np.array_equal(codes(q).reshape(want_codes.shape).numpy(), want_codes)


def sample(shape: tuple[int, ...], seed: int, low: float, high: float) -> torch.Tensor:
    """Signed values with exponents all over [low, high], a third of the groups zeros."""
    rng = np.random.default_rng(seed)
    x = np.exp2(rng.uniform(low, high, shape)) * rng.choice([-1.0, 1.0, 0.0, -0.0], shape)
    x = torch.from_numpy(x.astype(np.float32))
    if shape[-1] > 32:
        x[..., : shape[-2] // 3, :32] = 0.0
    return x


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 100))
    | st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 70)),
    seed=st.integers(0, 2**32),
    low=st.floats(-155, 120),
    width=st.floats(0, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_every_tensor_is_quantized_as_the_definition_says(shape, seed, low, width, dtype):
    x = sample(shape, seed, low, min(low + width, 127.9)).to(dtype)
    x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
    before = x.clone()
    assert_is_oracle(x, quantize_mxfp8(x, fp32_as="master"))
    assert torch.equal(x, before), "the input must not be written to"


def all_bfloat16() -> torch.Tensor:
    """A group of 32 for every bf16 magnitude: it, parts of it of either sign, a zero."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    parts = torch.linspace(-1, 1, 29)[None, :] * amax.float()[:, None]
    zeros = torch.zeros(len(amax), 2)
    return torch.cat([amax.float()[:, None], zeros, parts], dim=1).bfloat16()


def test_the_scale_of_every_bfloat16_amax():
    """Also at 2^20 elements and above, where the compiled path may have done the work."""
    x = all_bfloat16()
    assert x.numel() < 2**20 < 2 * x.numel()
    q = quantize_mxfp8(x)
    double = torch.stack([x, x])
    for index in (0, 1):
        again = quantize_mxfp8(double)
        assert torch.equal(again.scale_inv[index], q.scale_inv)
        assert torch.equal(codes(again)[index], codes(q))
    amax = x.double().abs().amax(dim=1)
    scale = torch.ldexp(torch.ones(len(amax)).double(), q.scale_inv.flatten().int() - 127)
    assert (amax <= 448 * scale).all()
    assert ((amax > 224 * scale) | (q.scale_inv.flatten() == 0)).all()
    assert q.scale_inv[0].item() == 0 and not codes(q)[0, :3].any()


def test_the_bytes_of_scales_are_torchs_e8m0():
    x = sample((40, 64), 1, -140, 120)
    q = quantize_mxfp8(x, fp32_as="master")
    scales = q.scale_inv.view(torch.float8_e8m0fnu).double().repeat_interleave(32, dim=1)
    want = (q.data.double() * scales).float()
    assert torch.equal(dequantize_mxfp8(q, torch.float32), want)


def test_every_byte_of_a_scale_is_read():
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    found = dequantize_mxfp8(
        MXFP8Tensor(torch.ones(256, 3).to(torch.float8_e4m3fn), byte), torch.float32
    )
    want = torch.ldexp(torch.ones(256).double(), torch.arange(256) - 127).float()
    assert torch.equal(found[:255], want[:255, None].expand(255, 3))
    assert found[255].isnan().all()
    assert found[0, 0].item() == 2.0**-127


def test_it_is_the_blockwise_cast_but_for_zeros_and_the_tiniest():
    x = sample((64, 200), 2, -30, 30)
    q, blockwise = (
        quantize_mxfp8(x, fp32_as="master"),
        quantize_blockwise(x, block_size=(1, 32), fp32_as="master"),
    )
    assert torch.equal(codes(q), blockwise.data.view(torch.uint8))
    zero = q.scale_inv == 0
    assert zero.any() and (blockwise.scale_inv[zero] == 1.0).all()
    assert torch.equal(torch.exp2(q.scale_inv[~zero].float() - 127.0), blockwise.scale_inv[~zero])


def test_fp32_is_master_or_export_and_never_unsaid():
    x = sample((8, 64), 3, -4, 4)
    export, master = (quantize_mxfp8(x, fp32_as=choice) for choice in ("export", "master"))
    assert torch.equal(codes(export), codes(quantize_mxfp8(x.bfloat16())))
    assert not torch.equal(codes(export), codes(master))
    with pytest.raises(QuantFormatError, match="w: is fp32, and fp32_as is None"):
        quantize_mxfp8(x, name="w")


def test_strides_and_empty_tensors():
    x = sample((64, 48), 4, -8, 8).bfloat16()
    assert torch.equal(codes(quantize_mxfp8(x.t())), codes(quantize_mxfp8(x.t().contiguous())))
    for shape, scales in [((0, 40), (0, 2)), ((3, 0), (3, 0)), ((2, 0, 5), (2, 0, 1))]:
        q = quantize_mxfp8(torch.empty(shape, dtype=torch.bfloat16))
        assert (q.shape, tuple(q.scale_inv.shape)) == (shape, scales)
        assert dequantize_mxfp8(q).shape == shape


def test_what_is_not_defined_is_refused():
    x = torch.zeros(4, 40, dtype=torch.bfloat16)
    q = quantize_mxfp8(x)
    assert q.nbytes == 4 * 40 + 4 * 2
    for call, message in [
        (lambda: quantize_mxfp8(x[None, None]), r"\[N, K\] or \[E, N, K\]"),
        (lambda: quantize_mxfp8(x.double()), "dtype must be one of"),
        (lambda: dequantize_mxfp8(q, torch.float64), "dtype must be"),
        (lambda: MXFP8Tensor(x, q.scale_inv), "data must be torch.float8_e4m3fn"),
        (lambda: MXFP8Tensor(q.data, q.scale_inv[:, :1]), r"must be torch.uint8 \(4, 2\)"),
        (lambda: MXFP8Tensor(q.data, q.scale_inv.int()), "must be torch.uint8"),
    ]:
        with refusal(QuantFormatError, message):
            call()
    x[2, 33] = math.nan
    with pytest.raises(NonFiniteWeightError, match=r"w: 1 non-finite .* \[2, 33\]"):
        quantize_mxfp8(x, name="w")


def test_vllm_quantizes_every_bfloat16_magnitude_to_the_same_bytes():
    theirs = pytest.importorskip("vllm.model_executor.layers.quantization.utils.mxfp8_utils")
    x = all_bfloat16()
    q = quantize_mxfp8(x)
    data, scales = theirs._mxfp8_e4m3_quantize_torch(x)
    assert torch.equal(q.scale_inv, scales)
    assert torch.equal(codes(q), data.view(torch.uint8))


def test_vllm_dequantizes_to_the_same_values():
    theirs = pytest.importorskip("vllm.model_executor.layers.quantization.utils.mxfp8_utils")
    q = quantize_mxfp8(sample((16, 128), 5, -60, 60), fp32_as="master")
    assert torch.equal(dequantize_mxfp8(q), theirs.dequant_mxfp8_to_bf16(q.data, q.scale_inv))


def torchao_mx(x: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    modes = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode
    scales, data = mx.to_mx(x, torch.float8_e4m3fn, 32, modes(mode))
    return data, scales.view(torch.uint8)


def test_torchaos_rceil_gives_the_same_bytes_above_the_tiniest():
    x = all_bfloat16()
    q = quantize_mxfp8(x)
    data, scales = torchao_mx(x, "rceil")
    assert torch.equal(q.scale_inv, scales)
    scaled = q.scale_inv.flatten() > 0  # it does not scale a group of byte 0
    assert torch.equal(codes(q)[scaled], data.view(torch.uint8)[scaled])


def test_the_rule_that_ocp_suggests_saturates_where_ours_does_not():
    """They differ for an amax in (1.75, 2) * 2^k, where floor's largest element becomes 448."""
    x = all_bfloat16()
    x = x[(x[:, 0] >= 2.0**-118) & (x[:, 0] < 3.2e38)]
    q = quantize_mxfp8(x)
    data, scales = torchao_mx(x, "floor")
    mantissa, _ = torch.frexp(x[:, 0].double())
    above = mantissa * 2 > 1.75
    assert torch.equal(q.scale_inv.flatten().int(), scales.flatten().int() + above.int())
    assert torch.equal(codes(q)[~above], data.view(torch.uint8)[~above])
    assert (data.float()[above].abs().amax(dim=1) == 448).all()
    theirs = dequantize_mxfp8(MXFP8Tensor(data, scales), torch.float32)
    loss = 1 - theirs[:, 0].double() / x[:, 0].double()
    ours = (1 - dequantize_mxfp8(q, torch.float32)[:, 0].double() / x[:, 0].double()).abs()
    assert 0.12 < loss.max() < 0.125 and ours.max() < 0.059
