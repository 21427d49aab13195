"""Which tensors are quantized, decided once for trainer and engine, before either starts.

Linear weights of decoder layers are quantized; embeddings, norms, routers, biases and the head
never are, whatever is asked. The first or last N layers and modules matching a pattern can be kept
in BF16, and so can linears whose shape the engine cannot serve in FP8. From one plan come the
names, dtypes and shapes the engine receives and the `quantization_config` it starts from, so the
two cannot disagree; `audit` compares the plan with what an engine says that it holds.

Source: vLLM 0.32, layers/quantization/fp8.py (`modules_to_not_convert`: exact names, a fused linear
by its parts, experts by their common module); transformers 5, FineGrainedFP8Config (the same key).
Left out: `scale_fmt`, of which one reads the arithmetic and the other the storage of the scales.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, get_args

import torch

from fp8rl.quant.architectures import CheckpointTensor, checkpoint_tensors
from fp8rl.quant.architectures_rule import tensors_by_rule
from fp8rl.quant.architectures_table import MODULE_ALIASES
from fp8rl.quant.audit import SCALE_SUFFIX, EngineTensor, PlanDifference, differences
from fp8rl.quant.errors import QuantPlanError
from fp8rl.quant.plan_choices import kept_by_user, refuse_unfit, unfit_linears
from fp8rl.quant.scales import ScaleFormat
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape

BLOCK_SIZE: Final = (128, 128)

WeightPrecision = Literal["fp8", "bf16"]
UnfitShapes = Literal["refuse", "keep"]
RouterPrecision = Literal["bf16", "fp8-rounded"]


@dataclass(frozen=True)
class PlanEntry:
    """One tensor of the checkpoint, whether it is quantized, and why.

    dtype: in which the engine holds it: E4M3 where it is quantized, else BF16, rarely fp32.
    rounded: the engine holds it in BF16, with the values that blockwise FP8 leaves of it.
    """

    name: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str
    dtype: torch.dtype
    rounded: bool = False


@dataclass(frozen=True)
class QuantPlan:
    """The decision for every tensor of a checkpoint, in checkpoint order.

    weights: "fp8" or "bf16", the precision of quantized weights; with "bf16" none is quantized.
    kept_modules: linear modules that stay BF16 in an FP8 engine by exact name, with the head; the
    experts of a layer by the name of the module that holds them all.
    by_rule: the architecture is not known, so what each tensor is was guessed from its name.
    scale_format: the rule that makes the scales of quantized weights.
    """

    entries: tuple[PlanEntry, ...]
    weights: WeightPrecision
    kept_modules: tuple[str, ...]
    by_rule: bool = False
    scale_format: ScaleFormat = "pow2"

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
        unfit: UnfitShapes = "refuse",
        scale_format: ScaleFormat = "pow2",
        router: RouterPrecision = "bf16",
    ) -> "QuantPlan":
        """Plan the model of a Hugging Face `config` (config.json as a mapping).

        keep_first_layers, keep_last_layers: decoder layers whose linears stay BF16.
        keep_patterns: shell patterns (`*`, `?`, `[..]`) on module names of decoder linears, for
        instance `model.layers.*.mlp.down_proj`; one that matches nothing is an error.
        tensor_parallel: ranks of the engine, for the shape checks.
        unfit: what to do with linears whose shape the engine cannot serve in FP8: raise, or keep
        them, and whatever is fused with them, in BF16 by name.
        scale_format: of the weights' scales. With "fp32" a kernel that wants powers of two, as
        DeepGEMM with E8M0 scales does on CUDA, quantizes anew while it loads, and the engine then
        holds other bytes than were sent.
        router: of a model with experts. "fp8-rounded": the weights of its routers go through
        blockwise FP8 and back, as they would where a stack quantizes them, and stay BF16.

        Raises QuantPlanError for an architecture that is not known, a bad argument, a fused module
        kept in part, and a shape the engine cannot serve.
        """
        tensors = checkpoint_tensors(config)
        keep = kept_by_user(tensors, keep_first_layers, keep_last_layers, keep_patterns)
        chosen = (weights, tensor_parallel, unfit, scale_format)
        plan = cls._decide(tensors, keep, *chosen, by_rule=False)
        if router == "bf16":
            return plan
        return replace(plan, entries=_rounded_routers(plan.entries, tensors, router))

    @classmethod
    def from_tensors(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        weights: WeightPrecision = "fp8",
        keep_first_layers: int = 0,
        keep_last_layers: int = 0,
        keep_patterns: Sequence[str] = (),
        tensor_parallel: int = 1,
        unfit: UnfitShapes = "refuse",
        scale_format: ScaleFormat = "pow2",
    ) -> "QuantPlan":
        """Plan a model of which only the checkpoint's tensors are known, name -> shape, by rule.

        A 2-D `.weight` in a numbered decoder layer counts as a linear unless its name says norm,
        embedding or router. `by_rule` is True, and every reason says so; read them before you rely
        on them. Arguments and errors as in `from_hf_config`.
        """
        tensors = tensors_by_rule(shapes)
        keep = kept_by_user(tensors, keep_first_layers, keep_last_layers, keep_patterns)
        chosen = (weights, tensor_parallel, unfit, scale_format)
        return cls._decide(tensors, keep, *chosen, by_rule=True)

    @classmethod
    def _decide(
        cls,
        tensors: Sequence[CheckpointTensor],
        keep: Mapping[str, str],
        weights: WeightPrecision,
        tensor_parallel: int,
        unfit: UnfitShapes,
        scale_format: ScaleFormat,
        *,
        by_rule: bool,
    ) -> "QuantPlan":
        """Turn tensors and choices into a plan; `keep`: linears kept by the user -> reason."""
        if weights not in ("fp8", "bf16"):
            raise QuantPlanError(f"weights must be 'fp8' or 'bf16', found {weights!r}")
        if unfit not in ("refuse", "keep"):
            raise QuantPlanError(f"unfit must be 'refuse' or 'keep', found {unfit!r}")
        if scale_format not in get_args(ScaleFormat):
            raise QuantPlanError(f"scale_format must be 'pow2' or 'fp32', found {scale_format!r}")
        if tensor_parallel < 1:
            raise QuantPlanError(f"tensor_parallel must be at least 1, found {tensor_parallel}")
        misfits = unfit_linears(tensors, tensor_parallel, BLOCK_SIZE)
        if weights == "bf16":
            keep = {t.name: "the engine's weights are bf16" for t in tensors if t.role == "linear"}
        elif unfit == "refuse":
            refuse_unfit(tensors, misfits, keep)
        keep = {name: f"kept: {problem}" for name, problem in misfits.items()} | dict(keep)
        entries = tuple(_entry(t, keep.get(t.name), by_rule) for t in tensors)
        return cls(entries, weights, _kept_modules(tensors, keep), by_rule, scale_format)

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
            received.append(EngineTensor(entry.name, entry.dtype, entry.shape))
            if entry.quantized:
                scales = scale_shape(entry.shape, BLOCK_SIZE)
                received.append(EngineTensor(entry.name + SCALE_SUFFIX, torch.float32, scales))
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

    def audit(self, engine_layers: Iterable[EngineTensor]) -> list[PlanDifference]:
        """Name every difference between this plan and what an engine reports; [] if there is none.

        engine_layers: the tensors that the engine's modules take, whole, under checkpoint names;
        scales of the KV cache among them are passed over.
        """
        return differences(self.engine_tensors(), engine_layers, BLOCK_SIZE)


def _entry(tensor: CheckpointTensor, keep: str | None, by_rule: bool) -> PlanEntry:
    if tensor.role == "unplaced":
        reason = "never quantized: not the 2-D weight of a numbered decoder layer"
    elif tensor.role != "linear":
        reason = f"never quantized: {tensor.role}"
    else:
        reason = keep or "linear weight of a decoder layer"
    if by_rule:
        reason = f"by rule, the architecture is not known: {reason}"
    quantized = tensor.role == "linear" and keep is None
    dtype = FP8_DTYPE if quantized else tensor.dtype
    return PlanEntry(tensor.name, tensor.shape, quantized, reason, dtype)


def _rounded_routers(
    entries: Iterable[PlanEntry], tensors: Iterable[CheckpointTensor], router: RouterPrecision
) -> tuple[PlanEntry, ...]:
    """Mark the weights of routers as rounded; their biases are none of it."""
    if router != "fp8-rounded":
        raise QuantPlanError(f"router must be 'bf16' or 'fp8-rounded', found {router!r}")
    names = {t.name for t in tensors if t.role == "router" and len(t.shape) == 2}
    if not names:
        raise QuantPlanError(
            "router is 'fp8-rounded', but this model has no experts and no router; leave it at "
            "'bf16'"
        )
    reason = "router, rounded to FP8 and back"
    return tuple(
        replace(entry, rounded=True, reason=reason) if entry.name in names else entry
        for entry in entries
    )


def _kept_modules(tensors: Iterable[CheckpointTensor], keep: Mapping[str, str]) -> tuple[str, ...]:
    """Modules that an engine would quantize unless told: matrices, but for embeddings."""
    modules = []
    for t in tensors:
        if t.role != "embedding" and len(t.shape) > 1 and (t.role != "linear" or t.name in keep):
            of_experts = t.fused is not None and t.module.startswith(f"{t.fused}.")
            modules.append(t.fused if t.fused and of_experts else t.module)
    for ours, theirs in MODULE_ALIASES.items():
        modules += [module.replace(ours, theirs) for module in modules if ours in module]
    return tuple(dict.fromkeys([*modules, "lm_head"]))
