"""Numbers: the blockwise FP8 cast, which tensors it applies to, and the scales of the KV cache.

Start with `quantize_blockwise`, `QuantPlan.from_hf_config` and `KVScales.from_amax`. Needs torch
alone, and imports nothing else of fp8rl.
"""

from fp8rl.quant.blockwise import dequantize_blockwise, quantize_activations, quantize_blockwise
from fp8rl.quant.errors import (
    KVScaleError,
    NonFiniteActivationError,
    NonFiniteError,
    NonFiniteWeightError,
    QuantFormatError,
    QuantPlanError,
)
from fp8rl.quant.kv_scales import QKV, KVScales, LayerScales, kv_scale_name
from fp8rl.quant.measure import QuantError, measure_error
from fp8rl.quant.observer import AmaxObserver
from fp8rl.quant.plan import EngineTensor, PlanEntry, QuantPlan, WeightPrecision
from fp8rl.quant.scales import E4M3_MAX, ScaleFormat
from fp8rl.quant.tensor import QuantizedTensor

__all__ = [
    "E4M3_MAX",
    "QKV",
    "AmaxObserver",
    "EngineTensor",
    "KVScaleError",
    "KVScales",
    "LayerScales",
    "NonFiniteActivationError",
    "NonFiniteError",
    "NonFiniteWeightError",
    "PlanEntry",
    "QuantError",
    "QuantFormatError",
    "QuantPlan",
    "QuantPlanError",
    "QuantizedTensor",
    "ScaleFormat",
    "WeightPrecision",
    "dequantize_blockwise",
    "kv_scale_name",
    "measure_error",
    "quantize_activations",
    "quantize_blockwise",
]
