"""Numbers: the blockwise FP8 cast, which tensors it applies to, and the scales of the KV cache.

Start with `quantize_blockwise`, `QuantPlan.from_hf_config` and `KVScales.from_amax`. Needs torch
alone, and imports nothing else of fp8rl.
"""

from fp8rl.quant.audit import EngineTensor, PlanDifference
from fp8rl.quant.blockwise import (
    FP32Source,
    dequantize_blockwise,
    empty_quantized,
    quantize_activations,
    quantize_blockwise,
)
from fp8rl.quant.convert import Conversion, convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions
from fp8rl.quant.errors import (
    CheckpointFormatError,
    CheckpointWriteError,
    ConversionError,
    FakeQuantError,
    KVScaleError,
    NonFiniteActivationError,
    NonFiniteError,
    NonFiniteWeightError,
    QuantFormatError,
    QuantPlanError,
    RankLostError,
    ShardError,
)
from fp8rl.quant.fake_quant import (
    FakeQuantization,
    TrainerLinear,
    fake_quantize,
    hugging_face_linears,
)
from fp8rl.quant.kv_observation import AttentionShape, KVObservation
from fp8rl.quant.kv_observer import KVObserver
from fp8rl.quant.kv_rule import EMA, Amax, KVCalibrator, KVScaleRule, Latest, Percentile, RunningMax
from fp8rl.quant.kv_scales import QKV, KVScales, LayerScales, TensorScale, kv_scale_name
from fp8rl.quant.measure import QuantError, measure_error
from fp8rl.quant.mxfp8 import MXFP8Tensor, dequantize_mxfp8, quantize_mxfp8
from fp8rl.quant.plan import (
    PlanEntry,
    QuantPlan,
    RouterPrecision,
    UnfitShapes,
    WeightPrecision,
)
from fp8rl.quant.scales import E4M3_MAX, ScaleFormat
from fp8rl.quant.shard_layout import Box, ShardLayout
from fp8rl.quant.sharded import QuantizedShard, WeightShard, join_shards, quantize_shards
from fp8rl.quant.tensor import QuantizedTensor

__all__ = [
    "E4M3_MAX",
    "EMA",
    "QKV",
    "Amax",
    "AttentionShape",
    "Box",
    "CheckpointFormatError",
    "CheckpointWriteError",
    "Conversion",
    "ConversionError",
    "ConvertOptions",
    "EngineTensor",
    "FP32Source",
    "FakeQuantError",
    "FakeQuantization",
    "KVCalibrator",
    "KVObservation",
    "KVObserver",
    "KVScaleError",
    "KVScaleRule",
    "KVScales",
    "Latest",
    "LayerScales",
    "MXFP8Tensor",
    "NonFiniteActivationError",
    "NonFiniteError",
    "NonFiniteWeightError",
    "Percentile",
    "PlanDifference",
    "PlanEntry",
    "QuantError",
    "QuantFormatError",
    "QuantPlan",
    "QuantPlanError",
    "QuantizedShard",
    "QuantizedTensor",
    "RankLostError",
    "RouterPrecision",
    "RunningMax",
    "ScaleFormat",
    "ShardError",
    "ShardLayout",
    "TensorScale",
    "TrainerLinear",
    "UnfitShapes",
    "WeightPrecision",
    "WeightShard",
    "convert_checkpoint",
    "dequantize_blockwise",
    "dequantize_mxfp8",
    "empty_quantized",
    "fake_quantize",
    "hugging_face_linears",
    "join_shards",
    "kv_scale_name",
    "measure_error",
    "quantize_activations",
    "quantize_blockwise",
    "quantize_mxfp8",
    "quantize_shards",
]
