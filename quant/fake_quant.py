"""Linears that compute with the weights the engine holds: fake quantization, and its removal.

    W~ = dequantize(quantize_blockwise(W))       the bytes that are published, read back
    x~ = x, or dequantize(quantize_activations(x)) where the engine's kernel takes FP8 activations
    forward    y = x~ W~^T
    backward   dL/dW = (dL/dy)^T x~,   dL/dx = (dL/dy) W~        the rounding counts as the identity

The gradient of a weight is that of a plain linear with this input, and goes to the weight itself
(straight-through: Bengio, Leonard, Courville, arXiv 1308.3432). The gradient of the input goes
through W~, which the forward used, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3: dgrad in FP8).

The plan speaks of Hugging Face tensors; a trainer's linear may hold several of them with their rows
interleaved (Megatron's q, k, v), so each is taken out by its rows, quantized in blocks of its own,
and put back. A rank's shard must fill whole blocks, else its bytes would not be the published ones.

While attached, a linear's forward finds W~ where its weight stands and puts the weight back when it
returns: parameters, their names, the state dict and the optimizer see nothing. This is for any
module whose forward reads `self.weight` [N, K] and takes the input first: `nn.Linear`, Megatron's
ColumnParallelLinear and RowParallelLinear. Left out: experts stacked in one parameter, Megatron's
fused weight gradient, attention and its KV cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp8rl.quant.activations import GROUP, round_activations
from fp8rl.quant.blockwise import (
    FP32Source,
    dequantize_blockwise,
    quantize_activations,
    quantize_blockwise,
)
from fp8rl.quant.errors import FakeQuantError
from fp8rl.quant.plan import BLOCK_SIZE, QuantPlan
from fp8rl.quant.scales import ScaleFormat


class TrainerLinear(NamedTuple):
    """A linear of the trainer, and the Hugging Face tensors in its weight [N, K].

    rows: name -> int64 [n], the rows of the weight which, in this order, are that tensor, or this
    rank's shard of it. Together they are all rows of the weight.
    """

    module: nn.Module
    rows: Mapping[str, Tensor]


def hugging_face_linears(model: nn.Module, plan: QuantPlan) -> list[TrainerLinear]:
    """Find the linears that `plan` quantizes in a model whose module names are Hugging Face's.

    Raises FakeQuantError where a planned tensor is not the weight of an `nn.Linear` of this model.
    """
    found = []
    modules = dict(model.named_modules())
    for entry in plan.entries:
        if not entry.quantized:
            continue
        module = modules.get(entry.name.removesuffix(".weight"))
        if not isinstance(module, nn.Linear):
            raise FakeQuantError(
                f"{entry.name}: expected an nn.Linear of that name in {type(model).__name__}, "
                f"found {type(module).__name__}; hand over its linears as TrainerLinear"
            )
        found.append(TrainerLinear(module, {entry.name: torch.arange(module.out_features)}))
    return found


def fake_quantize(
    linears: Iterable[TrainerLinear],
    plan: QuantPlan,
    *,
    activations: ScaleFormat | None,
    fp32_as: FP32Source | None = None,
) -> "FakeQuantization":
    """Make these linears compute with the weights that `plan` publishes, until `remove`.

    linears: linears that the plan keeps are left alone. activations: the scale format of 1x128
    groups where the engine's kernel quantizes its input (W8A8), None where it does not (W8A16, as
    vLLM's own on a CPU). fp32_as: what fp32 weights are published as, see `quantize_blockwise`.

    Raises FakeQuantError where a linear cannot give the published bytes or is attached already,
    QuantPlanError for a name that the plan lacks; nothing is attached then. While attached, a
    forward raises NonFiniteWeightError or NonFiniteActivationError on NaN or Inf.
    """
    attached = []
    for linear in linears:
        columns = _check_linear(linear)
        entries = [plan.entry(name) for name in linear.rows]
        decided = {entry.name: entry.quantized or entry.rounded for entry in entries}
        if any(decided.values()) and not all(decided.values()):
            raise FakeQuantError(
                f"one linear holds {decided} (name: quantized), but its input has one precision; "
                "quantize all of these tensors or none"
            )
        if not all(decided.values()):
            continue
        for name, rows in linear.rows.items():
            _check_shard(name, plan.entry(name).shape, (len(rows), columns))
        taken = None if entries[0].rounded else activations  # a rounded one is computed in BF16
        attached.append(_FakeLinear(linear, plan.scale_format, taken, fp32_as))
    _check_once(attached)
    for one in attached:
        one.module.forward = one.forward
    return FakeQuantization(attached)


class FakeQuantization:
    """The handle of what `fake_quantize` attached."""

    def __init__(self, linears: "list[_FakeLinear]") -> None:
        self._linears = linears

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that are fake-quantized, in order; empty once removed."""
        return tuple(name for linear in self._linears for name, _ in linear.parts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Quantize each weight once in this block, instead of once in every forward.

        For the micro-batches between two optimizer steps. Costs a second copy of the weights. The
        weights must not change inside: FakeQuantError where torch's version counter tells so,
        which writes to `weight.data` do not move.
        """
        for linear in self._linears:
            linear.holds = True
        try:
            yield
        finally:
            for linear in self._linears:
                linear.holds, linear.kept = False, None

    def remove(self) -> None:
        """Give every linear its own forward back; calling it again does nothing.

        Raises FakeQuantError where someone has wrapped a forward since; nothing was removed.
        """
        for linear in self._linears:
            if linear.module.__dict__.get("forward") != linear.forward:
                raise FakeQuantError(
                    f"the forward of the linear with {linear.parts[0][0]} was replaced after "
                    "fake_quantize; undo that first"
                )
        for linear in self._linears:
            linear.detach()
        self._linears = []


class _FakeLinear:
    """One attached linear. `forward` is a bound method, so that a deepcopy is one of the copy."""

    def __init__(
        self,
        linear: TrainerLinear,
        scale_format: ScaleFormat,
        activations: ScaleFormat | None,
        fp32_as: FP32Source | None,
    ) -> None:
        self.module = linear.module
        self.parts = tuple(linear.rows.items())
        self.holds = False
        self.kept: tuple[Tensor, int, Tensor] | None = None  # weight, its version, W~
        self._scale_format, self._fp32_as = scale_format, fp32_as
        self._activations = activations
        self._own = linear.module.__dict__.get("forward")  # None: that of the class
        self._plain = linear.module.forward
        first = self.parts[0][1].cpu()
        self._one_in_order = len(self.parts) == 1 and torch.equal(first, torch.arange(len(first)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the module's own forward."""
        parameters: dict[str, Any] = self.module._parameters
        weight = parameters["weight"]
        if self._activations is not None:
            if not args:
                raise FakeQuantError(f"{self.parts[0][0]}: the input must be the first argument")
            args = (_fake_activations(args[0], self._activations), *args[1:])
        parameters["weight"] = _straight_through(weight, self._dequantized(weight))
        try:
            return self._plain(*args, **kwargs)
        finally:
            parameters["weight"] = weight

    def detach(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward
        if self._own is not None:
            self.module.forward = self._own

    def _dequantized(self, weight: Tensor) -> Tensor:
        if self.kept is not None:
            held, version, result = self.kept
            if held is not weight or version != weight._version:
                raise FakeQuantError(
                    f"the weight with {self.parts[0][0]} changed inside held(); end the block "
                    "before the optimizer's step"
                )
            return result
        result = self._quantize_dequantize(weight.detach())
        if self.holds:
            self.kept = (weight, weight._version, result)
        return result

    def _quantize_dequantize(self, weight: Tensor) -> Tensor:
        if self._one_in_order:
            return self._read_back(self.parts[0][0], weight)
        result = torch.empty_like(weight)
        for name, rows in self.parts:
            rows = rows.to(weight.device)
            result[rows] = self._read_back(name, weight[rows])
        return result

    def _read_back(self, name: str, weight: Tensor) -> Tensor:
        quantized = quantize_blockwise(
            weight, name=name, fp32_as=self._fp32_as, scale_format=self._scale_format
        )
        return dequantize_blockwise(quantized, weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return result


def _fake_activations(
    x: Float[Tensor, "*tokens k"], scale_format: ScaleFormat
) -> Float[Tensor, "*tokens k"]:
    values = x.detach()
    if scale_format == "pow2" and values.dtype == torch.bfloat16 and not values.shape[-1] % GROUP:
        rounded = round_activations(values)
        if bool(rounded.sum().isfinite()):  # else the slow way finds out what is wrong
            return _straight_through(x, rounded)
    quantized = quantize_activations(values, scale_format=scale_format)
    return _straight_through(x, dequantize_blockwise(quantized, x.dtype))


def _check_once(attached: "list[_FakeLinear]") -> None:
    seen: set[int] = set()
    for one in attached:
        if id(one.module) in seen:
            raise FakeQuantError(
                f"the linear with {one.parts[0][0]} was given twice; give each module once, with "
                "all tensors in its weight"
            )
        seen.add(id(one.module))


def _check_linear(linear: TrainerLinear) -> int:
    """Return K; raise unless the module is a free linear, unfused, of the rows that are given."""
    module, names = linear.module, list(linear.rows)
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not names:
        shape = None if weight is None else tuple(weight.shape)
        raise FakeQuantError(
            f"{names}: expected a linear with a weight [N, K], found {type(module).__name__} "
            f"with weight {shape}"
        )
    rows = torch.cat([rows.cpu() for rows in linear.rows.values()])
    if not torch.equal(rows.sort().values, torch.arange(weight.shape[0])):
        raise FakeQuantError(
            f"{names}: the {len(rows)} rows given are not the {weight.shape[0]} rows of the "
            "weight, each once"
        )
    if isinstance(getattr(module.__dict__.get("forward"), "__self__", None), _FakeLinear):
        raise FakeQuantError(f"{names}: fake-quantized already; remove that first")
    if getattr(module, "gradient_accumulation_fusion", False):
        raise FakeQuantError(
            f"{names}: Megatron's fused weight gradient writes to the main_grad of the weight that "
            "the forward used, and W~ has none; set gradient_accumulation_fusion=False"
        )
    return int(weight.shape[1])


def _check_shard(name: str, whole: tuple[int, ...], shard: tuple[int, int]) -> None:
    """Raise unless `shard` is all of the tensor, or an equal cut of it in whole blocks."""
    cut = [dim for dim in (0, 1) if shard[dim] != whole[dim]]
    if len(cut) > 1 or any(whole[dim] % shard[dim] for dim in cut):
        raise FakeQuantError(
            f"{name}: the plan's tensor is {whole}, but the linear holds {shard} of it, which is "
            "no equal cut of its rows or columns; plan and model must be of one shape"
        )
    for dim in cut:
        if shard[dim] % BLOCK_SIZE[dim]:
            raise FakeQuantError(
                f"{name} {whole}: this rank holds {shard} of it, so a block of {BLOCK_SIZE} "
                "straddles ranks and cannot be quantized here; use fewer tensor-parallel ranks, "
                "or keep the tensor in BF16 through keep_patterns"
            )
