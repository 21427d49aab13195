"""Which linears stay in BF16: those the user names, and those the engine could not serve in FP8.

The engine computes some linears as one module (q, k, v; gate, up; all experts of a layer) whose
parts share a precision. So a user's choice that cuts such a module is refused, and a part that does
not fit keeps the whole module back.

A linear fits if what a tensor-parallel rank holds of it is whole blocks in both dimensions.

Source: vLLM 0.32, utils/fp8_utils.py (`validate_fp8_block_shape`, `validate_fp8_block_shape_moe`)
and its activation quantization (K in whole groups). Stricter than vLLM where kernels differ: all
rows are checked but those marked `ragged`, and experts are not refined to smaller blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from fp8rl.quant.architectures import CheckpointTensor
from fp8rl.quant.errors import QuantPlanError


def kept_by_user(
    tensors: Sequence[CheckpointTensor], first: int, last: int, patterns: Sequence[str]
) -> dict[str, str]:
    """Map the name of each linear that the user wants in BF16 to the reason.

    Raises QuantPlanError for more layers than there are, a pattern that matches nothing, and a
    choice that keeps a fused module in part.
    """
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
    _check_fused(linears, keep)
    return keep


def _check_fused(linears: Iterable[CheckpointTensor], keep: Mapping[str, str]) -> None:
    """Raise where some but not all parts of a fused module are kept."""
    for fused, parts in _fused_parts(linears).items():
        kept = [t.name for t in parts if t.name in keep]
        if kept and len(kept) != len(parts):
            quantized = [t.name for t in parts if t.name not in keep]
            raise QuantPlanError(
                f"the engine fuses {len(parts)} linears into {fused}, so they must share a "
                f"precision, but {_some(kept)} would be kept and {_some(quantized)} quantized; "
                "keep all of them or none"
            )


def unfit_linears(
    tensors: Iterable[CheckpointTensor], ranks: int, block_size: tuple[int, int]
) -> dict[str, str]:
    """Map each linear that the engine cannot serve in FP8 over `ranks` to what is wrong.

    With one part of a fused module all are unfit, and come after it. Raises QuantPlanError where
    the engine could not split a linear in any precision.
    """
    linears = [t for t in tensors if t.role == "linear"]
    unfit = {}
    for tensor in linears:
        problem = _misfit(tensor, ranks, block_size)
        if problem is not None:
            unfit[tensor.name] = problem
    for fused, parts in _fused_parts(linears).items():
        culprit = next((t.name for t in parts if t.name in unfit), None)
        if culprit is not None:
            for t in parts:
                unfit.setdefault(t.name, f"part of {fused}, as is {culprit}: {unfit[culprit]}")
    return unfit


def refuse_unfit(
    tensors: Iterable[CheckpointTensor], unfit: Mapping[str, str], keep: Mapping[str, str]
) -> None:
    """Raise QuantPlanError for linears that are unfit and that the user did not keep."""
    by_name = {t.name: t for t in tensors}
    refused = [by_name[name] for name in unfit if name not in keep]
    if refused:
        first = refused[0]
        others = f" and the other parts of {first.fused}" if first.fused else ""
        more = f" ({len(refused) - 1} more linears cannot be served)" if len(refused) > 1 else ""
        raise QuantPlanError(
            f"{first.name} {first.shape}: {unfit[first.name]}{more}; change the model's sizes, "
            f"use fewer ranks, keep {first.module}{others} in BF16 through keep_patterns, or keep "
            "every linear that does not fit with unfit='keep'"
        )


def _misfit(tensor: CheckpointTensor, ranks: int, block_size: tuple[int, int]) -> str | None:
    """Say why a rank's part of a linear [N, K] cannot be served in FP8; None if it can."""
    assert tensor.split is not None
    units = tensor.split.units
    held = list(tensor.shape)
    for dim in tensor.split.dims:
        if units is None and held[dim] % ranks:
            return f"dimension {dim} of {tensor.shape} does not divide over {ranks} ranks"
        if units is None or units % ranks == 0:
            held[dim] //= ranks
        elif tensor.split.replicated and ranks % units == 0:
            held[dim] //= units
        else:
            raise QuantPlanError(
                f"{tensor.name} {tensor.shape}: dimension {dim} is made of {units} heads or "
                f"channels, which do not divide over tensor_parallel={ranks}; choose a divisor of "
                f"{units}"
            )
    rows, columns = (size % block for size, block in zip(held, block_size, strict=True))
    if columns or (rows and not tensor.ragged):
        return (
            f"with tensor_parallel={ranks} a rank holds {tuple(held)}, but FP8 needs multiples of "
            f"{block_size}"
        )
    return None


def _fused_parts(linears: Iterable[CheckpointTensor]) -> dict[str, list[CheckpointTensor]]:
    parts: dict[str, list[CheckpointTensor]] = {}
    for tensor in linears:
        if tensor.fused is not None:
            parts.setdefault(tensor.fused, []).append(tensor)
    return parts


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
