"""Which tensors are quantized, decided once for trainer and engine, before either starts.

Linear weights of decoder layers are quantized; embeddings, norms and the head never are. The first
or last N layers and modules matching a pattern can be kept in BF16. From one plan come the names,
dtypes and shapes the engine receives and the `quantization_config` it starts from, so the two
cannot disagree. What the engine could not load is refused here: it computes q, k, v and gate, up as
one fused linear each, whose parts must share a precision and, on every rank, fill whole blocks.

Source: vLLM 0.32, layers/quantization/fp8.py (`modules_to_not_convert`, exact names) and
utils/fp8_utils.py (`validate_fp8_block_shape`); this plan is stricter and wants every rank's N and
K to be a multiple of 128. Left out: keeping unfit shapes in BF16 unasked.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import torch

from fp8rl.quant.architectures import CheckpointTensor, checkpoint_tensors
from fp8rl.quant.errors import QuantPlanError
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape

BLOCK_SIZE: Final = (128, 128)

WeightPrecision = Literal["fp8", "bf16"]


class EngineTensor(NamedTuple):
    """One tensor as the engine receives it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlanEntry:
    """One tensor of the checkpoint, whether it is quantized, and why."""

    name: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """The decision for every tensor of a checkpoint, in checkpoint order.

    weights: "fp8" or "bf16", the precision of quantized weights; with "bf16" none is quantized.
    kept_modules: linear modules that stay BF16 in an FP8 engine by exact name, with the head.
    """

    entries: tuple[PlanEntry, ...]
    weights: WeightPrecision
    kept_modules: tuple[str, ...]

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        *,
        weights: WeightPrecision = "fp8",
        keep_first_layers: int = 0,
        keep_last_layers: int = 0,
        keep_patterns: Sequence[str] = (),
        tensor_parallel: int = 1,
    ) -> "QuantPlan":
        """Plan the model of a Hugging Face `config` (config.json as a mapping).

        keep_first_layers, keep_last_layers: decoder layers whose linears stay BF16.
        keep_patterns: shell patterns (`*`, `?`, `[..]`) on module names of decoder linears, for
        instance `model.layers.*.mlp.down_proj`; one that matches nothing is an error.
        tensor_parallel: ranks of the engine, for the shape checks.

        Raises QuantPlanError for an unsupported architecture, a bad argument, a fused linear kept
        in part, and a shape the engine cannot serve in FP8.
        """
        if weights not in ("fp8", "bf16"):
            raise QuantPlanError(f"weights must be 'fp8' or 'bf16', found {weights!r}")
        if tensor_parallel < 1:
            raise QuantPlanError(f"tensor_parallel must be at least 1, found {tensor_parallel}")
        tensors = checkpoint_tensors(config)
        keep = _kept_linears(tensors, keep_first_layers, keep_last_layers, keep_patterns)
        _check_fused(tensors, keep)
        entries = []
        for tensor in tensors:
            reason = _reason_to_keep(tensor, weights, keep)
            _check_shape(tensor, tensor_parallel, quantized=reason is None)
            why = reason or "linear weight of a decoder layer"
            entries.append(PlanEntry(tensor.name, tensor.shape, reason is None, why))
        kept = tuple(t.module for t in tensors if t.name in keep)
        return cls(tuple(entries), weights, (*kept, "lm_head"))

    @cached_property
    def _by_name(self) -> dict[str, PlanEntry]:
        return {entry.name: entry for entry in self.entries}

    def entry(self, name: str) -> PlanEntry:
        """Return the entry of a checkpoint tensor; QuantPlanError for a name the plan lacks."""
        found = self._by_name.get(name)
        if found is None:
            nearest = difflib.get_close_matches(name, self._by_name, n=1, cutoff=0.0)
            raise QuantPlanError(
                f"tensor {name!r} has no place in this plan of {len(self.entries)} tensors; "
                f"the nearest known name is {nearest[0] if nearest else None!r}. The model that "
                "sends it and the config that the plan was made from must be the same."
            )
        return found

    def is_quantized(self, name: str) -> bool:
        """Tell whether a checkpoint tensor is quantized; QuantPlanError for an unknown name."""
        return self.entry(name).quantized

    def engine_tensors(self) -> list[EngineTensor]:
        """List what the engine receives: FP8 data with fp32 `weight_scale_inv`, or BF16."""
        received = []
        for entry in self.entries:
            if entry.quantized:
                scales = scale_shape(entry.shape, BLOCK_SIZE)
                received.append(EngineTensor(entry.name, FP8_DTYPE, entry.shape))
                received.append(EngineTensor(f"{entry.name}_scale_inv", torch.float32, scales))
            else:
                received.append(EngineTensor(entry.name, torch.bfloat16, entry.shape))
        return received

    def quantization_config(self) -> dict[str, Any] | None:
        """Return `quantization_config` for the engine's config.json; None for a BF16 engine."""
        if self.weights == "bf16":
            return None
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(BLOCK_SIZE),
            "activation_scheme": "dynamic",
            "modules_to_not_convert": list(self.kept_modules),
        }


def _kept_linears(
    tensors: Sequence[CheckpointTensor], first: int, last: int, patterns: Sequence[str]
) -> dict[str, str]:
    """Map the name of each linear weight that the caller wants in BF16 to the reason."""
    linears = [t for t in tensors if t.role == "linear"]
    layers = 1 + max(t.layer for t in linears if t.layer is not None)
    for argument, value in (("keep_first_layers", first), ("keep_last_layers", last)):
        if not 0 <= value <= layers:
            raise QuantPlanError(f"{argument} must be in 0..{layers} (all layers), found {value}")
    keep = {}
    for tensor in linears:
        if tensor.layer is not None and tensor.layer < first:
            keep[tensor.name] = f"kept: one of the first {first} layers"
        elif tensor.layer is not None and tensor.layer >= layers - last:
            keep[tensor.name] = f"kept: one of the last {last} layers"
    for pattern in patterns:
        matched = [t.name for t in linears if fnmatchcase(t.module, pattern)]
        if not matched:
            raise QuantPlanError(
                f"keep pattern {pattern!r} matches no linear module of a decoder layer; they are "
                f"named like {linears[0].module!r}, without '.weight'"
            )
        for name in matched:
            keep.setdefault(name, f"kept: matches pattern {pattern!r}")
    return keep


def _reason_to_keep(
    tensor: CheckpointTensor, weights: WeightPrecision, keep: Mapping[str, str]
) -> str | None:
    if tensor.role != "linear":
        return f"never quantized: {tensor.role}"
    if weights == "bf16":
        return "the engine's weights are bf16"
    return keep.get(tensor.name)


def _check_fused(tensors: Sequence[CheckpointTensor], keep: Mapping[str, str]) -> None:
    """Raise where some but not all parts of a fused linear are kept."""
    shards: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.fused is not None:
            shards.setdefault(tensor.fused, []).append(tensor.name)
    for fused, names in shards.items():
        kept = [name for name in names if name in keep]
        if kept and len(kept) != len(names):
            quantized = [name for name in names if name not in keep]
            raise QuantPlanError(
                f"the engine fuses {', '.join(names)} into {fused}, so they must share a "
                f"precision, but {', '.join(kept)} would be kept and {', '.join(quantized)} "
                "quantized; keep all of them or none"
            )


def _check_shape(tensor: CheckpointTensor, ranks: int, *, quantized: bool) -> None:
    """Raise where the engine cannot split a linear over `ranks`, or the shard fills no blocks."""
    if tensor.split is None:
        return
    dim, units = tensor.split.dim, tensor.split.units
    if units % ranks == 0:
        rank_units = units // ranks
    elif tensor.split.replicated and ranks % units == 0:
        rank_units = 1
    else:
        raise QuantPlanError(
            f"{tensor.name} {tensor.shape}: dimension {dim} is made of {units} heads or channels, "
            f"which do not divide over tensor_parallel={ranks}; choose a divisor of {units}"
        )
    if not quantized:
        return
    shard = list(tensor.shape)
    shard[dim] = shard[dim] // units * rank_units
    if any(size % block for size, block in zip(shard, BLOCK_SIZE, strict=True)):
        others = f" and the other parts of {tensor.fused}" if tensor.fused else ""
        raise QuantPlanError(
            f"{tensor.name} {tensor.shape}: with tensor_parallel={ranks} a rank holds "
            f"{tuple(shard)}, but FP8 needs multiples of {BLOCK_SIZE}; change the model's sizes, "
            f"use fewer ranks, or keep {tensor.module}{others} in BF16 through keep_patterns"
        )
