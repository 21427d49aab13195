"""Transformer Engine's layout is read as documented, and its bytes are ours; on a GPU, TE's own."""

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    NonFiniteWeightError,
    QuantFormatError,
    QuantizedTensor,
    dequantize_blockwise,
    quantize_blockwise,
)
from fp8rl.quant.errors import TransformerEngineError
from fp8rl.quant.transformer_engine import (
    block_scaling_recipe,
    from_rowwise,
    from_transformer_engine,
    megatron_settings,
    scale_environment,
)

without_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="TE is installed"
)
FORMATS = pytest.mark.parametrize("scale_format", ["pow2", "fp32"])


def weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k)).bfloat16()


def rowwise(q: QuantizedTensor, padding: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """As TE stores it: uint8 codes; scales with columns up to a multiple of 4, uninitialized."""
    rows, columns = q.scale_inv.shape
    scales = torch.full((rows, -(-columns // 4) * 4), padding)
    scales[:, :columns] = q.scale_inv
    return q.data.view(torch.uint8), scales


@FORMATS
@settings(max_examples=20)
@given(n=st.integers(1, 300), k=st.integers(1, 700))
def test_codes_and_scales_come_out_as_they_went_in(scale_format, n, k):
    expected = quantize_blockwise(weight(n, k), scale_format=scale_format)
    data, scales = rowwise(expected)
    found = from_rowwise(data, scales, scale_format=scale_format)
    assert found.data.data_ptr() == data.data_ptr()
    assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(found.scale_inv, expected.scale_inv) and found.scale_inv.is_contiguous()
    assert found.scale_format == scale_format
    assert torch.equal(dequantize_blockwise(found), dequantize_blockwise(expected))


@pytest.mark.parametrize("width", [3, 8])
def test_scales_of_another_layout_are_refused(width):
    data, _ = rowwise(quantize_blockwise(weight(256, 384)))
    with pytest.raises(QuantFormatError, match=r"q_proj: .*must have shape \(2, 4\), found \(2, "):
        from_rowwise(data, torch.ones(2, width), name="q_proj")


def test_scales_that_are_no_powers_of_two_are_refused_unless_asked_for():
    data, scales = rowwise(quantize_blockwise(weight(256, 256), scale_format="fp32"))
    with pytest.raises(QuantFormatError, match=r"q_proj: 4 scale.*block \[0, 0\].*FP32_SCALES.*0"):
        from_rowwise(data, scales, name="q_proj")
    assert from_rowwise(data, scales, scale_format="fp32").scale_format == "fp32"


@FORMATS
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_dequantize_to_nothing_sensible_are_refused(scale_format, value):
    data, scales = rowwise(quantize_blockwise(weight(256, 256)))
    scales[1, 0] = value
    with pytest.raises(QuantFormatError, match=r"block \[1, 0\]"):
        from_rowwise(data, scales, scale_format=scale_format)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused_by_name_and_place(code):
    data, scales = rowwise(quantize_blockwise(weight(256, 256)))
    data[3, 5] = data[200, 1] = code
    with pytest.raises(NonFiniteWeightError, match=r"q_proj: 2 non-finite") as found:
        from_rowwise(data, scales, name="q_proj")
    assert (found.value.count, found.value.first_index) == (2, (3, 5))


def test_the_largest_codes_are_no_nan():
    data, scales = torch.full((128, 128), 0x7E, dtype=torch.uint8), torch.ones(1, 4)
    data[0] = 0xFE
    values = dequantize_blockwise(from_rowwise(data, scales)).unique()
    assert values.tolist() == [-448.0, 448.0]


def test_the_settings_are_fields_of_megatrons_configuration():
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4}
    plain = TransformerConfig(**shape, **megatron_settings())
    assert (plain.fp8, plain.fp8_recipe, plain.fp8_param) == ("e4m3", Fp8Recipe.blockwise, True)
    assert not plain.first_last_layers_bf16
    kept = TransformerConfig(**shape, **megatron_settings(keep_first_layers=2))
    ends = (kept.num_layers_at_start_in_bf16, kept.num_layers_at_end_in_bf16)
    assert kept.first_last_layers_bf16 and ends == (2, 0)


def test_power_of_two_scales_are_asked_for_even_where_the_variable_is_set_otherwise():
    assert scale_environment() == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}
    assert scale_environment("fp32") == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}


@without_te
@pytest.mark.parametrize("call", [block_scaling_recipe, lambda: from_transformer_engine(object())])
def test_without_transformer_engine_the_error_says_what_to_install(call):
    with pytest.raises(TransformerEngineError, match=r"2\.3 or later.*fp8rl\[te\]"):
        call()


def test_the_file_is_imported_without_transformer_engine():
    import fp8rl.quant.transformer_engine as module

    assert not {"transformer_engine", "te", "tex"} & vars(module).keys()


def te_weight(values: torch.Tensor, scale_format: str, **options):
    """The values as TE's own quantizer stores them."""
    pytest.importorskip("transformer_engine.pytorch")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    chosen = {"rowwise": True, "columnwise": True, "block_scaling_dim": 2} | options
    make = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, force_pow_2_scales=scale_format == "pow2", **chosen
    )
    return make(values.cuda())


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("shape", [(128, 128), (384, 640), (256, 1152)])
def test_transformer_engines_bytes_are_those_of_quantize_blockwise(scale_format, shape):
    values = weight(*shape)
    stored = te_weight(values, scale_format)
    found = from_transformer_engine(stored, scale_format=scale_format)
    expected = quantize_blockwise(values.cuda(), scale_format=scale_format)
    assert found.data.data_ptr() == stored._rowwise_data.data_ptr()
    assert torch.equal(found.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(found.scale_inv, expected.scale_inv)
    assert torch.equal(dequantize_blockwise(found), stored.dequantize(dtype=torch.bfloat16))


@pytest.mark.gpu
def test_tensors_that_hold_no_weight_in_square_blocks_are_refused():
    with pytest.raises(QuantFormatError, match="_is_2D_scaled=False"):
        from_transformer_engine(te_weight(weight(256, 256), "pow2", block_scaling_dim=1))
    with pytest.raises(QuantFormatError, match="transpose alone"):
        from_transformer_engine(te_weight(weight(256, 256), "pow2", rowwise=False))
    with pytest.raises(QuantFormatError, match="found Tensor"):
        from_transformer_engine(weight(256, 256))


@pytest.mark.gpu
def test_the_recipe_has_the_scales_asked_for_or_is_refused():
    recipes = pytest.importorskip("transformer_engine.common.recipe")
    pow2 = recipes.Float8BlockScaling().fp8_quant_fwd_weight.power_2_scale
    have, lack = ("pow2", "fp32") if pow2 else ("fp32", "pow2")
    recipe = block_scaling_recipe(have)
    assert (recipe.w_block_scaling_dim, recipe.x_block_scaling_dim) == (2, 1)
    with pytest.raises(TransformerEngineError, match="before it is imported"):
        block_scaling_recipe(lack)
