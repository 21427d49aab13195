"""What a conversion does, decided before a byte of a weight is read.

Every tensor of the source is matched with the plan made from its config: one that is missing, left
over or of another shape is an error that names tensor and file. Each becomes a `Part`:

    quantize     BF16, FP16 or FP32 linear    ->  E4M3 `name`, fp32 `name_scale_inv`
    dequantize   E4M3 and `name_scale_inv`    ->  BF16 `name`
    round        FP32, where the linears are  ->  BF16
    copy         everything else              ->  the same bytes

Each source file becomes one destination file of the same name. A model whose linears are fp32
becomes one that is BF16 where it is not FP8, as an engine would hold it; fp32 tensors of a BF16
model (a router's bias) are fp32 on purpose and stay.

Source: transformers, quantizer_finegrained_fp8; vLLM, quantization/fp8 (names and config). Left
out: FP8 in any other form than blockwise with dynamic activation scales.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fp8rl.quant.architectures_table import ARCHITECTURES
from fp8rl.quant.audit import SCALE_SUFFIX
from fp8rl.quant.blockwise import FP32Source
from fp8rl.quant.checkpoint import Checkpoint
from fp8rl.quant.checkpoint_experts import hub_tensors
from fp8rl.quant.checkpoint_file import Shard, StoredTensor
from fp8rl.quant.checkpoint_writer import FileLayout, OutputTensor
from fp8rl.quant.errors import CheckpointFormatError, ConversionError, QuantPlanError
from fp8rl.quant.plan import BLOCK_SIZE, QuantPlan, UnfitShapes
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape

Target = Literal["fp8", "bf16"]
Action = Literal["copy", "round", "quantize", "dequantize"]

_QUANTIZABLE = (torch.bfloat16, torch.float16, torch.float32)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class ConvertOptions:
    """What to make of a checkpoint.

    to: "fp8" (blockwise) or "bf16" (back).
    fp32_as: what fp32 linears stand for, see `quantize_blockwise`.
    keep_first_layers, keep_last_layers, keep_patterns, tensor_parallel, unfit: see `QuantPlan`.
    report: measure the error of each quantized tensor.
    """

    to: Target = "fp8"
    fp32_as: FP32Source | None = None
    keep_first_layers: int = 0
    keep_last_layers: int = 0
    keep_patterns: tuple[str, ...] = ()
    tensor_parallel: int = 1
    unfit: UnfitShapes = "refuse"
    report: bool = False


@dataclass(frozen=True)
class Part:
    """One tensor of the source, or one linear of a stack, under its name in the destination."""

    action: Action
    source: StoredTensor
    scale: StoredTensor | None = None

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What is written for it, the data first."""
        name, shape = self.source.name, self.source.shape
        if self.action == "copy":
            return (OutputTensor(name, self.source.dtype, shape),)
        if self.action == "quantize":
            scales = scale_shape(shape, BLOCK_SIZE)
            return (
                OutputTensor(name, FP8_DTYPE, shape),
                OutputTensor(f"{name}{SCALE_SUFFIX}", torch.float32, scales),
            )
        return (OutputTensor(name, torch.bfloat16, shape),)


@dataclass(frozen=True)
class FilePlan:
    """One file of the destination, and the parts that fill it, in the order of the source."""

    shard: Shard
    parts: tuple[Part, ...]
    layout: FileLayout


@dataclass(frozen=True)
class ConversionPlan:
    """All of a conversion.

    block_size: of the quantized tensors. config: the destination's config.json. choice: which
    tensors are quantized and why; None where nothing is to be quantized.
    """

    files: tuple[FilePlan, ...]
    block_size: tuple[int, int]
    config: Mapping[str, Any]
    choice: QuantPlan | None


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    """Decide what becomes of every tensor.

    Raises ConversionError where the options do not fit the checkpoint, CheckpointFormatError where
    its tensors do not fit its config, QuantPlanError where no plan can be made of that.
    """
    if options.to == "bf16":
        return _plan_bf16(checkpoint, options)
    return _plan_fp8(checkpoint, options)


def _plan_fp8(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    method = checkpoint.config.get("quantization_config")
    if method is not None:
        raise ConversionError(
            f"{checkpoint.folder}: is quantized already (quantization_config {_brief(method)}); "
            "start from the BF16 checkpoint, or make one with --to bf16"
        )
    plan = _quant_plan(checkpoint, options)
    known = {entry.name for entry in plan.entries}
    held = [hub_tensors(shard.tensors, known) for shard in checkpoint.shards]
    tensors = [tensor for of_shard in held for tensor in of_shard]
    _check_against_plan(checkpoint, plan, tensors)
    quantized = {entry.name for entry in plan.entries if entry.quantized}
    linears = [tensor for tensor in tensors if tensor.name in quantized]
    rounding = _is_fp32(linears, options.fp32_as)
    engine = {entry.name: entry.dtype for entry in plan.entries}

    def part(tensor: StoredTensor) -> Part:
        if tensor.name in quantized:
            return Part("quantize", tensor)
        wide = rounding and tensor.dtype == torch.float32
        if wide and engine.get(tensor.name, torch.bfloat16) == torch.bfloat16:
            return Part("round", tensor)
        return Part("copy", tensor)

    parts = [[part(tensor) for tensor in of_shard] for of_shard in held]
    config = {**checkpoint.config, "quantization_config": plan.quantization_config()}
    config = _with_bf16(config) if rounding else config
    return ConversionPlan(_files(checkpoint, parts), BLOCK_SIZE, config, plan)


def _quant_plan(checkpoint: Checkpoint, options: ConvertOptions) -> QuantPlan:
    """The plan of a known architecture, or the one by rule."""
    choices: dict[str, Any] = {
        "keep_first_layers": options.keep_first_layers,
        "keep_last_layers": options.keep_last_layers,
        "keep_patterns": options.keep_patterns,
        "tensor_parallel": options.tensor_parallel,
        "unfit": options.unfit,
    }
    architectures: Any = checkpoint.config.get("architectures")
    one = isinstance(architectures, list) and len(architectures) == 1
    if one and architectures[0] not in ARCHITECTURES:
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        return QuantPlan.from_tensors(shapes, **choices)
    return QuantPlan.from_hf_config(checkpoint.config, **choices)


def _check_against_plan(
    checkpoint: Checkpoint, plan: QuantPlan, tensors: Sequence[StoredTensor]
) -> None:
    """Raise unless the tensors are those of the plan, but for what every loader skips."""
    for tensor in tensors:
        if _is_skipped_by_loaders(tensor.name, checkpoint.config):
            continue
        try:
            entry = plan.entry(tensor.name)
        except QuantPlanError as error:
            raise CheckpointFormatError(f"{tensor.path}: {error}") from error
        if entry.shape != tensor.shape:
            raise CheckpointFormatError(
                f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}, and config.json "
                f"describes {entry.shape}; the two are not of one model"
            )
        if tensor.dtype in _FP8 or (entry.quantized and tensor.dtype not in _QUANTIZABLE):
            raise CheckpointFormatError(
                f"{tensor.path}: tensor {tensor.name!r} has dtype {tensor.dtype}, expected one of "
                f"{_QUANTIZABLE}"
            )
    held = {tensor.name for tensor in tensors}
    for entry in plan.entries:
        if entry.name not in held:
            raise CheckpointFormatError(
                f"{checkpoint.folder}: lacks tensor {entry.name!r} {entry.shape}, which the model "
                "of config.json has; copy or download the checkpoint again"
            )


def _is_skipped_by_loaders(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor may be there or not: a tied head, tables that models compute anew, and
    layers that predict further tokens, which a loader of the model itself passes over.
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and config.get("num_nextn_predict_layers"):
        return int(layer[1]) >= int(config["num_hidden_layers"])
    tied = name == "lm_head.weight" and config.get("tie_word_embeddings") is True
    return tied or name.endswith(".rotary_emb.inv_freq")


def _is_fp32(linears: Sequence[StoredTensor], fp32_as: FP32Source | None) -> bool:
    """Whether the model is an fp32 one; ConversionError where that asks for a choice."""
    fp32 = [tensor for tensor in linears if tensor.dtype == torch.float32]
    if fp32 and fp32_as is None:
        raise ConversionError(
            f"{fp32[0].path}: {fp32[0].name} is fp32, as {len(fp32)} of the {len(linears)} tensors "
            "to quantize are, and nothing says what they stand for. Choose --fp32-as master (the "
            "fp32 values are quantized) or --fp32-as export (they are rounded to bf16 first, as a "
            "BF16 checkpoint would hold them): the two give different weights"
        )
    return bool(fp32)


def _plan_bf16(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    for field in dataclasses.fields(options):
        if field.name != "to" and getattr(options, field.name) != field.default:
            raise ConversionError(
                f"{field.name} says how to quantize, which --to bf16 does not; leave it out"
            )
    block_size = _block_size(checkpoint)
    tensors = checkpoint.tensors

    def part(tensor: StoredTensor) -> Part | None:
        of = tensors.get(tensor.name.removesuffix(SCALE_SUFFIX))
        if of is not None and of is not tensor and of.dtype in _FP8:
            return None  # a scale; it is read with its tensor
        if tensor.dtype in _FP8 or tensor.name.endswith(SCALE_SUFFIX):
            return Part("dequantize", tensor, _scale_of(tensor, tensors, block_size))
        return Part("copy", tensor)

    found = [[part(tensor) for tensor in shard.tensors] for shard in checkpoint.shards]
    parts = [[part for part in of_shard if part is not None] for of_shard in found]
    kept = {key: v for key, v in checkpoint.config.items() if key != "quantization_config"}
    return ConversionPlan(_files(checkpoint, parts), block_size, _with_bf16(kept), None)


def _block_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """The blocks of an FP8 checkpoint; ConversionError where it is another kind of checkpoint."""
    found = checkpoint.config.get("quantization_config")
    fields = found if isinstance(found, dict) else {}
    block: Any = fields.get("weight_block_size")
    blockwise = (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in block)
    )
    dynamic = fields.get("activation_scheme", "dynamic") == "dynamic"
    e4m3 = fields.get("fmt", "e4m3") == "e4m3"
    if not (fields.get("quant_method") == "fp8" and blockwise and dynamic and e4m3):
        raise ConversionError(
            f"{checkpoint.folder}: is no blockwise FP8 checkpoint, so there is nothing to convert "
            "back: its quantization_config must have quant_method 'fp8', a weight_block_size of "
            f"two sizes, dynamic activations and E4M3; found {_brief(found)}"
        )
    return block[0], block[1]


def _scale_of(
    tensor: StoredTensor, tensors: Mapping[str, StoredTensor], block_size: tuple[int, int]
) -> StoredTensor:
    if tensor.dtype != FP8_DTYPE or len(tensor.shape) not in (2, 3):
        raise CheckpointFormatError(
            f"{tensor.path}: tensor {tensor.name!r} ({tensor.dtype}, shape {tensor.shape}) is "
            f"neither an E4M3 weight nor the {SCALE_SUFFIX} of one"
        )
    scale = tensors.get(f"{tensor.name}{SCALE_SUFFIX}")
    if scale is None:
        raise CheckpointFormatError(
            f"{tensor.path}: tensor {tensor.name!r} is E4M3 and has no "
            f"{tensor.name + SCALE_SUFFIX!r} beside it"
        )
    expected = scale_shape(tensor.shape, block_size)
    if scale.shape != expected or scale.dtype not in _SCALES:
        raise CheckpointFormatError(
            f"{scale.path}: tensor {scale.name!r} is {scale.dtype} {scale.shape}, expected "
            f"torch.float32 {expected} for blocks of {block_size}"
        )
    return scale


def _files(checkpoint: Checkpoint, parts: Sequence[Sequence[Part]]) -> tuple[FilePlan, ...]:
    files = []
    written: set[str] = set()
    for shard, of_shard in zip(checkpoint.shards, parts, strict=True):
        outputs = [output for part in of_shard for output in part.outputs]
        for output in outputs:
            if output.name in written:
                raise CheckpointFormatError(
                    f"{shard.path}: would give {output.name!r} a second time; the checkpoint holds "
                    "a tensor both stacked and by itself, or the scales of one that has none yet"
                )
            written.add(output.name)
        if outputs:  # a file of scales alone has none
            metadata = {"format": "pt", **shard.metadata}
            layout = FileLayout.of(shard.path.name, outputs, metadata)
            files.append(FilePlan(shard, tuple(of_shard), layout))
    return tuple(files)


def _with_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in BF16."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, "bfloat16")}


def _brief(value: object) -> str:
    return f"{value!r:.200}"
