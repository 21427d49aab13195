"""The error measure: its closed forms and its limits."""

import math

import pytest
import torch

from fp8rl.quant import QuantFormatError, dequantize_blockwise, measure_error, quantize_blockwise


def test_the_three_readings_of_a_known_error():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])
    error = measure_error(x, y)
    assert error.calc_diff == pytest.approx(1 - 2 * (9 + 14) / (25 + 21.25), rel=1e-12)
    assert error.relative_rms == pytest.approx(0.1, rel=1e-12)
    assert error.sqnr_db == pytest.approx(20, rel=1e-12)


def test_equal_tensors_have_no_error_and_a_zero_reference_only_error():
    assert measure_error(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0, math.inf)
    assert measure_error(torch.ones(3).bfloat16(), torch.ones(3)) == (0.0, 0.0, math.inf)
    assert measure_error(torch.zeros(2), torch.ones(2)) == (1.0, math.inf, -math.inf)


def test_blockwise_fp8_of_gaussian_weights_is_within_its_format():
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    for scale_format in ("pow2", "fp32"):
        q = quantize_blockwise(x, scale_format=scale_format, fp32_as="master")
        error = measure_error(x, dequantize_blockwise(q, torch.float32))
        assert 0.024 < error.relative_rms < 0.029
        assert error.calc_diff == pytest.approx(error.relative_rms**2 / 2, rel=0.05)


def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(QuantFormatError, match=r"\(2,\).*\(3,\)"):
        measure_error(torch.ones(2), torch.ones(3))
