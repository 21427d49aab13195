"""Transformer Engine's blockwise FP8: the settings that match ours, and its bytes as they are.

A trainer that keeps its weights in FP8 casts them from its fp32 masters. What it computes with is
then reached by no other way than its own bytes: quantizing the bf16 weights that it exports gives
others. Transformer Engine (TE) holds a weight [N, K] as a `Float8BlockwiseQTensor` with

    _rowwise_data        uint8 [N, K], the E4M3 codes
    _rowwise_scale_inv   fp32 [ceil(N/128), ceil(K/128) rounded up to 4], the multiplier that
                         dequantizes; the columns added are not initialized
    _columnwise_*        both of them transposed, for dgrad; carries nothing new
    _is_2D_scaled        True for 128 x 128 blocks (weights), False for 1 x 128 (activations)

so data and scales are ours once the added columns are off. Scales are powers of two unless TE was
imported under NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1: its recipe class reads the variable then and
never again, whatever it is constructed with.

Source: TransformerEngine 2.3 and later, common/recipe/__init__.py (`Float8BlockScaling`) and
pytorch/tensor/float8_blockwise_tensor.py (`get_scale_shape`); Megatron-core 0.16, fp8_utils.py
(`get_fp8_recipe`). All of it was read, not run: TE has no CPU build, and what needs it here has not
been run with it yet. Left out: the way back (bytes into TE), MXFP8 tensors, grouped linears.
"""

import math
from typing import Any, Final

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from fp8rl.quant.errors import NonFiniteWeightError, QuantFormatError, TransformerEngineError
from fp8rl.quant.scales import ScaleFormat
from fp8rl.quant.tensor import FP8_DTYPE, QuantizedTensor, scale_shape

FP32_SCALES_VARIABLE: Final = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"

_BLOCK: Final = (128, 128)
_SCALE_COLUMNS: Final = 4  # TE rounds the columns of its scales up to a multiple of this
_MANTISSA: Final = 0x7FFFFF


def scale_environment(scale_format: ScaleFormat = "pow2") -> dict[str, str]:
    """Return the environment variables under which TE makes these scales; set before its import.

    "pow2" is the format that the engine gets. TE makes no "fp32" scales on Blackwell.
    """
    return {FP32_SCALES_VARIABLE: "1" if scale_format == "fp32" else "0"}


def megatron_settings(*, keep_first_layers: int = 0, keep_last_layers: int = 0) -> dict[str, Any]:
    """Return the fields of Megatron-core's TransformerConfig that make a blockwise FP8 trainer.

    With these the linears of all layers but those kept, as in `QuantPlan.from_hf_config`, compute
    in FP8 and hold FP8 weights. Of Megatron-LM's command line: --fp8-format e4m3 --fp8-recipe
    blockwise --fp8-param-gather --first-last-layers-bf16 --num-layers-at-start-in-bf16 N
    --num-layers-at-end-in-bf16 N. A plan's keep_patterns have no counterpart there.
    """
    settings: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": True}
    if keep_first_layers or keep_last_layers:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": keep_first_layers,
            "num_layers_at_end_in_bf16": keep_last_layers,
        }
    return settings


def block_scaling_recipe(scale_format: ScaleFormat = "pow2") -> Any:
    """Return TE's `Float8BlockScaling`, E4M3 everywhere, weights in 128x128 and inputs in 1x128.

    Raises TransformerEngineError without TE 2.3 or later, and where TE was imported under an
    `scale_environment` for other scales.
    """
    try:
        from transformer_engine.common.recipe import Float8BlockScaling, Format
    except ImportError as error:
        raise _missing(error) from error
    recipe = Float8BlockScaling(fp8_format=Format.E4M3)
    wanted = scale_format == "pow2"
    for name in ("fp8_quant_fwd_weight", "fp8_quant_fwd_inp"):
        if getattr(recipe, name).power_2_scale is not wanted:
            raise TransformerEngineError(
                f"Transformer Engine's {name}.power_2_scale is {not wanted}, expected {wanted} for "
                f"scale_format {scale_format!r}; set {scale_environment(scale_format)} before it "
                "is imported"
            )
    return recipe


def from_transformer_engine(
    weight: Any, *, scale_format: ScaleFormat = "pow2", name: str = "weight"
) -> QuantizedTensor:
    """Take the bytes and scales of TE's FP8 weight; nothing is quantized, `data` shares its memory.

    weight: a `Float8BlockwiseQTensor` [N, K]. scale_format: that of the scales, see
    `from_rowwise`. name: for messages.

    Raises TransformerEngineError without TE; QuantFormatError where the weight is not E4M3 in
    128x128 blocks or keeps only its transpose; else as `from_rowwise`.
    """
    try:
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    except ImportError as error:
        raise _missing(error) from error
    if not isinstance(weight, Float8BlockwiseQTensor):
        raise QuantFormatError(
            f"{name}: expected a Float8BlockwiseQTensor, found {type(weight).__name__}; quantize "
            "high-precision weights by quantize_blockwise"
        )
    if not weight._is_2D_scaled or weight._fp8_dtype.name != "kFloat8E4M3":
        raise QuantFormatError(
            f"{name}: expected E4M3 in 128x128 blocks, found {weight._fp8_dtype} and "
            f"_is_2D_scaled={weight._is_2D_scaled}; use block_scaling_recipe"
        )
    if weight._rowwise_data is None:
        raise QuantFormatError(
            f"{name}: holds its transpose alone; publish before update_usage drops the rowwise data"
        )
    return from_rowwise(
        weight._rowwise_data, weight._rowwise_scale_inv, scale_format=scale_format, name=name
    )


def from_rowwise(
    data: UInt8[Tensor, "n k"],
    scale_inv: Float32[Tensor, "nb padded"],
    *,
    scale_format: ScaleFormat = "pow2",
    name: str = "weight",
) -> QuantizedTensor:
    """Read TE's rowwise layout of a weight in 128x128 blocks; `data` shares its memory.

    data: the E4M3 codes [N, K]. scale_inv: [ceil(N/128), ceil(K/128) rounded up to 4].
    scale_format: "pow2" demands powers of two; "fp32" takes any scales.

    Raises QuantFormatError where shapes or scales do not fit, NonFiniteWeightError on NaN codes.
    """
    rows, columns = scale_shape(tuple(data.shape), _BLOCK)
    padded = (rows, math.ceil(columns / _SCALE_COLUMNS) * _SCALE_COLUMNS)
    if tuple(scale_inv.shape) != padded:
        raise QuantFormatError(
            f"{name}: Transformer Engine's scales of a weight {tuple(data.shape)} in blocks of "
            f"{_BLOCK} must have shape {padded}, found {tuple(scale_inv.shape)}"
        )
    scales = scale_inv[:, :columns].contiguous()
    _check_scales(scales, scale_format, name)
    bad = (data & 0x7F) == 0x7F
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteWeightError(name, int(bad.sum()), first, math.nan)
    return QuantizedTensor(data.view(FP8_DTYPE), scales, _BLOCK, scale_format)


def _check_scales(scales: Tensor, scale_format: ScaleFormat, name: str) -> None:
    bad = ~(torch.isfinite(scales) & (scales > 0))
    expected = "finite and positive"
    if scale_format == "pow2":
        bad |= (scales.view(torch.int32) & _MANTISSA) != 0
        expected = f"a power of two; make it so by {scale_environment('pow2')} before TE's import"
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise QuantFormatError(
            f"{name}: {int(bad.sum())} scale(s) of {tuple(scales.shape)} are not as they should "
            f"be, the first at block {list(first)}: found {float(scales[first])}, expected "
            f"{expected}"
        )


def _missing(error: ImportError) -> TransformerEngineError:
    return TransformerEngineError(
        f"Transformer Engine 2.3 or later is needed here, and importing it failed: {error}; "
        'install "fp8rl[te]" on a machine with CUDA'
    )
