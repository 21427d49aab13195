"""The same bytes as others' own quantizers: vLLM's and Hugging Face's in pow2, torchao's in fp32.

Peers raise a smaller amax to a least one: vLLM to 1e-4 (activations: 2e-3), torchao to 1e-12. Where
the rules themselves differ, as for DeepGEMM's fp32 scales, the test says by how much.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    QuantizedTensor,
    dequantize_blockwise,
    quantize_activations,
    quantize_blockwise,
)

SHAPES = [(128, 128), (256, 384), (130, 200), (1, 1), (127, 300)]


def weights(shape: tuple[int, ...], seed: int, exponent: float) -> torch.Tensor:
    """A bf16 Gaussian matrix of scale 2^exponent whose blocks all have an amax above 1e-4."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[::128, ::128] = 2.0**exponent
    return x.bfloat16()


@pytest.fixture(scope="module")
def vllm_cast():
    deep_gemm = pytest.importorskip("vllm.utils.deep_gemm")

    def cast(
        x: torch.Tensor, block: list[int], pow2: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.compiler.set_stance("force_eager"):
            return deep_gemm.per_block_cast_to_fp8(x, block, use_ue8m0=pow2)

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


def test_activations_equal_vllms_linear_layers_bit_for_bit():
    """QuantFP8 in plain torch, which its layers trace; it has no scale below 1 / (448 * 512)."""
    theirs = pytest.importorskip("vllm.model_executor.layers.quantization.input_quant_fp8")
    layer = SimpleNamespace(group_size=128, use_ue8m0=True, column_major_scales=False)
    x = torch.randn(40, 7, 300, generator=torch.Generator().manual_seed(4))
    x = (x * torch.exp2(torch.arange(-6, 34).float())[:, None, None]).bfloat16()
    ours = quantize_activations(x)
    data, scale_inv = theirs.QuantFP8._quantize_group_native(layer, x)
    assert torch.equal(ours.data.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(ours.scale_inv, scale_inv)


def test_deepgemms_fp32_scales_are_ours_to_one_unit_in_the_last_place(vllm_cast):
    """It divides amax by 448, we 448 by amax (Transformer Engine's rule): a rounding apart."""
    x = weights((896, 1024), 5, -5)
    ours = quantize_blockwise(x, scale_format="fp32")
    data, scale_inv = vllm_cast(x, [128, 128], pow2=False)
    apart = (ours.scale_inv.view(torch.int32) - scale_inv.view(torch.int32)).abs()
    assert 0 < apart.float().mean() < 1 and apart.max() == 1
    moved = (ours.data.view(torch.uint8).int() - data.view(torch.uint8).int()).abs()
    assert 0 < (moved > 0).float().mean() < 0.001 and moved.max() == 1


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


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(128, 128), (256, 384)]),
    seed=st.integers(0, 2**31),
    exponent=st.floats(-38, 100),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_fp32_scales_equal_torchaos_training_recipe_bit_for_bit(shape, seed, exponent, dtype):
    theirs = pytest.importorskip("torchao.prototype.blockwise_fp8_training.kernels")
    x = weights(shape, seed, exponent).float()
    x = (x * (1 + torch.arange(x.numel()).reshape(shape) * 2.0**-20)).to(dtype)  # all mantissas
    for ours, cast in [
        (quantize_blockwise, theirs.torch_blockwise_scale_weight_quant),
        (quantize_groups, theirs.torch_blockwise_scale_act_quant_lhs),
    ]:
        q = ours(x, scale_format="fp32", fp32_as="master")
        data, scale_inv = cast(x)
        assert torch.equal(q.scale_inv, scale_inv)
        assert torch.equal(q.data.view(torch.uint8), data.view(torch.uint8))


def quantize_groups(x: torch.Tensor, *, scale_format: str, fp32_as: str) -> QuantizedTensor:
    """Activations know no master and export: fp32 is what it is."""
    return quantize_activations(x, scale_format=scale_format)
