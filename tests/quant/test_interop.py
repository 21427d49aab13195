"""The same bytes as vLLM's and Hugging Face's own quantizers, in the format on which they agree."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import dequantize_blockwise, quantize_activations, quantize_blockwise

SHAPES = [(128, 128), (256, 384), (130, 200), (1, 1), (127, 300)]


def weights(shape: tuple[int, ...], seed: int, exponent: float) -> torch.Tensor:
    """A bf16 Gaussian matrix of scale 2^exponent whose blocks all have an amax above 1e-4."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[::128, ::128] = 2.0**exponent
    return x.bfloat16()


@pytest.fixture(scope="module")
def vllm_cast():
    deep_gemm = pytest.importorskip("vllm.utils.deep_gemm")

    def cast(x: torch.Tensor, block: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.compiler.set_stance("force_eager"):
            return deep_gemm.per_block_cast_to_fp8(x, block, use_ue8m0=True)

    return cast


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**31),
    exponent=st.floats(-13, 100),
)
def test_weights_equal_vllms_bit_for_bit(vllm_cast, shape, seed, exponent):
    x = weights(shape, seed, exponent)
    ours = quantize_blockwise(x)
    data, scale_inv = vllm_cast(x, [128, 128])
    assert torch.equal(ours.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(ours.scale_inv, scale_inv)


def test_activations_equal_vllms_bit_for_bit(vllm_cast):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = quantize_activations(x)
    data, scale_inv = vllm_cast(x, [1, 128])
    assert torch.equal(ours.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(ours.scale_inv, scale_inv)


def test_vllms_requantization_at_load_changes_no_value():
    fp8_utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.fp8_utils")
    q = quantize_blockwise(weights((512, 1024), 2, -5))
    data, scale_inv = q.data.clone(), q.scale_inv.clone()
    with torch.compiler.set_stance("force_eager"):
        fp8_utils.requant_weight_ue8m0_inplace(data, scale_inv)
    after = type(q)(data, scale_inv, q.block_size, q.scale_format)
    assert torch.equal(dequantize_blockwise(after), dequantize_blockwise(q))


@pytest.fixture(scope="module")
def transformers_cast():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0")
        op = finegrained.Fp8Quantize(SimpleNamespace(quantization_config=config))
        out = op.convert({"w.weight": x})
        return out["w.weight"], out["w.weight_scale_inv"].float()

    return cast


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (3, 256, 128)])
@pytest.mark.parametrize("exponent", [-60, -5, 0, 60])
def test_weights_equal_transformers_bit_for_bit(transformers_cast, shape, exponent):
    x = weights(shape, 3, exponent)
    x[..., :128, :128] = 0.0
    ours = quantize_blockwise(x)
    data, scale_inv = transformers_cast(x)
    assert torch.equal(ours.scale_inv, scale_inv)
    assert np.array_equal(ours.data.view(torch.uint8).numpy(), data.view(torch.uint8).numpy())
