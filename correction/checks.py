"""Input checks shared by this room: shapes at once, values as soon as it costs no waiting.

On a CPU an unusable value is refused at once. On CUDA looking at one would wait for the device, so
it poisons instead: what was computed from it is NaN, and whoever reads the metrics (which waits
anyway) gets the error. Nothing unusable ever looks like a number.

Only unmasked positions are looked at: whatever stands at masked ones is nobody's business.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8rl.correction.errors import LogProbError, ShapeError, ValueRangeError

# Rounding in a bf16 or fused log-softmax puts the log of a probability near 1 slightly above 0.
POSITIVE_TOLERANCE = 1e-4


def check_shapes(mask: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not floats of the mask's shape.

    Raises:
        ShapeError: a tensor has another shape, or is not of a floating-point dtype.
    """
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ShapeError(
                f"{name}: shape {list(tensor.shape)}, expected {list(mask.shape)} like mask"
            )
        if not tensor.is_floating_point():
            raise ShapeError(f"{name}: dtype {tensor.dtype}, expected a floating-point dtype")


def waits(device: torch.device) -> bool:
    """Whether reading a tensor there would wait for the device, or break a compiled graph."""
    return device.type != "cpu" or torch.compiler.is_compiling()


def usable_logprob(x: Tensor) -> Tensor:
    """Where `x` is a log-probability: finite, and at most `POSITIVE_TOLERANCE`."""
    return (x <= POSITIVE_TOLERANCE) & (x > -torch.inf)


def check_values(
    mask: Tensor,
    *,
    logprobs: Mapping[str, Tensor],
    finite: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Refuse unusable values at unmasked positions; add what is returned to the result.

    Args:
        mask: bool, True for tokens that count.
        logprobs: tensors like `mask` that must be finite and at most `POSITIVE_TOLERANCE`.
        finite: tensors like `mask` that must be finite.

    Returns:
        0-d fp32: 0.0, or on CUDA, where nothing is raised, NaN if a value is unusable.

    Raises:
        LogProbError: a log-prob is NaN, infinite or positive; names tensor, count, first index.
        ValueRangeError: another tensor holds a NaN or an infinity.
    """
    bad = {name: (mask & ~usable_logprob(x)).any() for name, x in logprobs.items()}
    bad |= {name: (mask & ~torch.isfinite(x)).any() for name, x in (finite or {}).items()}
    flags = torch.stack(list(bad.values()))
    if not waits(mask.device) and flags.any():
        raise_first(mask, logprobs, finite or {})
    return torch.where(flags.any(), torch.nan, 0.0)


def raise_first(mask: Tensor, logprobs: Mapping[str, Tensor], finite: Mapping[str, Tensor]) -> None:
    """Raise for the first tensor with an unusable value; see `check_values`. Reads the device."""
    for name, x in logprobs.items():
        where = mask & ~usable_logprob(x)
        if where.any():
            raise LogProbError(
                f"{_found(name, x, where)}; expected finite log-probabilities (at most 0): mask "
                "positions that were not sampled, and pass log-probs of the sampled tokens"
            )
    for name, x in finite.items():
        where = mask & ~torch.isfinite(x)
        if where.any():
            raise ValueRangeError(f"{_found(name, x, where)}; expected finite numbers")


def _found(name: str, x: Tensor, where: Tensor) -> str:
    first = where.nonzero()[0].tolist()
    value = x[tuple(first)].item()
    return f"{name}: {int(where.sum())} unusable unmasked value(s), first {value} at {first}"
