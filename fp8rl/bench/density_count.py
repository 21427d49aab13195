"""What changes between two versions of a tensor, and what the delta between them weighs.

Counted are stored values that differ as bytes: BF16 elements as a BF16 engine holds them; FP8 codes
and their scales as an FP8 engine holds them, with fresh scales and with sticky ones. A code that
stays the same while its scale changes is not counted, its scale is. Weighed is what a publisher
would send: for each tensor that changed its encoded delta, or all its bytes where those are no
more; nothing for one that did not. A manifest is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Final

import torch
from torch import Tensor

from fp8rl.quant import QuantizedTensor, quantize_blockwise
from fp8rl.sync.delta import Width, encode_delta

KINDS: Final = {  # the first that a name holds; HF's names and Megatron's
    "norm": "norms",
    "embed": "embedding",
    "lm_head": "head",
    "output_layer": "head",
    "mlp": "MLP",
    "att": "attention",
}
ALL: Final = "all"


def kind_of(name: str) -> str:
    """Return what a tensor is: a value of `KINDS`."""
    return next(kind for part, kind in KINDS.items() if part in name)


@dataclass(frozen=True)
class Counts:
    """Of one tensor or several: how much there is, how much of it changed, and bytes to send.

    bf16_delta: to an engine whose weights are all BF16. fp8_delta, sticky_delta: to one whose
    linears are FP8, with fresh and with sticky scales; the rest of it is BF16.
    """

    elements: int = 0
    elements_changed: int = 0
    codes: int = 0
    codes_changed: int = 0
    sticky_codes_changed: int = 0
    scales: int = 0
    scales_changed: int = 0
    sticky_scales_changed: int = 0
    bf16_bytes: int = 0
    bf16_delta: int = 0
    fp8_delta: int = 0
    sticky_delta: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def shares(self) -> dict[str, float | None]:
        """Return the changed shares, None of nothing; and deltas as shares of the BF16 bytes."""
        return {
            "elements_changed": _share(self.elements_changed, self.elements),
            "codes_changed": _share(self.codes_changed, self.codes),
            "sticky_codes_changed": _share(self.sticky_codes_changed, self.codes),
            "scales_changed": _share(self.scales_changed, self.scales),
            "sticky_scales_changed": _share(self.sticky_scales_changed, self.scales),
            "bf16_delta": _share(self.bf16_delta, self.bf16_bytes),
            "fp8_delta": _share(self.fp8_delta, self.bf16_bytes),
            "sticky_delta": _share(self.sticky_delta, self.bf16_bytes),
        }


@dataclass(frozen=True, eq=False)
class Held:
    """One version of a tensor, in BF16 and, where it is quantized, in FP8 with either scales."""

    bf16: Tensor
    fresh: QuantizedTensor | None
    sticky: QuantizedTensor | None

    @classmethod
    def of(cls, values: Tensor, *, quantized: bool, last: Held | None) -> Held:
        """Hold `values` (bf16, or fp32 masters); sticky scales go on from `last`."""
        bf16 = values.to(torch.bfloat16, copy=True)
        if not quantized:
            return cls(bf16, None, None)
        fresh = quantize_blockwise(values, fp32_as="master")
        if last is None or last.sticky is None:
            return cls(bf16, fresh, fresh)
        previous = last.sticky.scale_inv
        sticky = quantize_blockwise(values, fp32_as="master", previous_scale_inv=previous)
        return cls(bf16, fresh, sticky)


def compare(before: Held, after: Held) -> Counts:
    """Count and weigh what changed of one tensor."""
    elements_changed, bf16_delta = _difference(before.bf16, after.bf16, 2)
    plain = {
        "elements": after.bf16.numel(),
        "elements_changed": elements_changed,
        "bf16_bytes": after.bf16.nbytes,
        "bf16_delta": bf16_delta,
    }
    if before.fresh is None or after.fresh is None or before.sticky is None or after.sticky is None:
        return Counts(**plain, fp8_delta=bf16_delta, sticky_delta=bf16_delta)
    codes_changed, codes_delta = _difference(before.fresh.data, after.fresh.data, 1)
    scales_changed, scales_delta = _difference(before.fresh.scale_inv, after.fresh.scale_inv, 2)
    sticky_codes, sticky_delta = _difference(before.sticky.data, after.sticky.data, 1)
    sticky_scales, sticky_scales_delta = _difference(
        before.sticky.scale_inv, after.sticky.scale_inv, 2
    )
    return Counts(
        **plain,
        codes=after.fresh.data.numel(),
        codes_changed=codes_changed,
        sticky_codes_changed=sticky_codes,
        scales=after.fresh.scale_inv.numel(),
        scales_changed=scales_changed,
        sticky_scales_changed=sticky_scales,
        fp8_delta=codes_delta + scales_delta,
        sticky_delta=sticky_delta + sticky_scales_delta,
    )


def compare_models(before: Mapping[str, Held], after: Mapping[str, Held]) -> dict[str, Counts]:
    """Count and weigh what changed of each kind of tensor, and of all together."""
    return by_kind((name, compare(before[name], held)) for name, held in after.items())


def by_kind(counts: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    """Add up the counts of named tensors by kind, and all."""
    found = dict.fromkeys(dict.fromkeys(KINDS.values()), Counts()) | {ALL: Counts()}
    for name, each in counts:
        found[kind_of(name)] += each
        found[ALL] += each
    return found


def _difference(before: Tensor, after: Tensor, width: Width) -> tuple[int, int]:
    """How many elements differ, and the bytes to send."""
    base, new = (t.contiguous().view(torch.uint8).flatten() for t in (before, after))
    apart = (base != new).view(-1, before.element_size()).any(dim=1)
    changed = int(apart.sum())
    if changed == 0:
        return 0, 0
    payload = encode_delta(base, new, width=width)
    return changed, new.numel() if payload is None else payload.numel()


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
