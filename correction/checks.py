"""Input checks shared by this room: shapes without a device sync, values with a single one.

Only unmasked positions are looked at: whatever stands at masked ones is nobody's business.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from fp8rl.correction.errors import LogProbError, MaskError, ShapeError, ValueRangeError

# Rounding in a bf16 or fused log-softmax puts the log of a probability near 1 slightly above 0.
POSITIVE_TOLERANCE = 1e-4


def check_shapes(mask: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a mask that is not a bool [batch, tokens], and tensors that are not floats like it.

    Raises:
        MaskError: the mask is not boolean, not two-dimensional, or has no positions.
        ShapeError: a tensor has another shape, or is not of a floating-point dtype.
    """
    if mask.dtype != torch.bool:
        raise MaskError(
            f"mask: dtype {mask.dtype}, expected torch.bool with True for tokens that count; "
            "use mask.bool()"
        )
    if mask.ndim != 2 or mask.numel() == 0:
        raise MaskError(f"mask: shape {list(mask.shape)}, expected a non-empty [batch, tokens]")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ShapeError(
                f"{name}: shape {list(tensor.shape)}, expected {list(mask.shape)} like mask"
            )
        if not tensor.is_floating_point():
            raise ShapeError(f"{name}: dtype {tensor.dtype}, expected a floating-point dtype")


def check_values(
    mask: Bool[Tensor, "batch tokens"],
    *,
    logprobs: Mapping[str, Tensor],
    finite: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse unusable values at unmasked positions; waits for the device once.

    Args:
        mask: bool [batch, tokens], True for tokens that count.
        logprobs: tensors like `mask` that must be finite and at most `POSITIVE_TOLERANCE`.
        finite: tensors like `mask` that must be finite.

    Raises:
        LogProbError: a log-prob is NaN, infinite or positive; names tensor, count, first index.
        ValueRangeError: another tensor holds a NaN or an infinity.
    """
    bad = {
        name: mask & ~((x <= POSITIVE_TOLERANCE) & (x > -torch.inf)) for name, x in logprobs.items()
    }
    bad |= {name: mask & ~torch.isfinite(x) for name, x in (finite or {}).items()}
    if not torch.stack([where.any() for where in bad.values()]).any():
        return
    name, where = next((name, where) for name, where in bad.items() if where.any())
    first = where.nonzero()[0].tolist()
    found = f"{name}: {int(where.sum())} unusable unmasked value(s), first"
    if name not in logprobs:
        value = (finite or {})[name][tuple(first)].item()
        raise ValueRangeError(f"{found} {value} at {first}; expected finite numbers")
    value = logprobs[name][tuple(first)].item()
    raise LogProbError(
        f"{found} {value} at {first}; expected finite log-probabilities (at most 0): "
        "mask positions that were not sampled, and pass log-probs of the sampled tokens"
    )
