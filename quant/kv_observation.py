"""What an observer saw of q, k and v: statistics of every layer that join over ranks exactly.

    amax_bits [L, Hq + 2 Hkv]    largest |x| of each head, as the bit pattern of an fp32 number
    tokens    [L, Hq + 2 Hkv]    real tokens seen by each head
    counts    [L, 3, 3]          elements of q, k, v: all, saturated, underflowed
    histogram [L, 3, 8192]       elements by exponent and the first 5 bits of the mantissa

Bit patterns of magnitudes order like the magnitudes, and Inf and NaN lie above all numbers. So one
MAX and one SUM over all ranks, whatever their layout (tensor parallel: other heads; data and
context parallel: other tokens; pipeline: other layers), give every rank the statistics of one
process that saw it all, NaN included. What a rank missed shows in `tokens`: every head of every
layer must have seen the same. Where key/value heads are replicated over tensor-parallel ranks they
have seen a multiple.

Percentile: the smallest bin edge at or above which p percent of the elements lie. It is never
below the exact percentile (nearest rank) and at most 2^-5 of it above; at most 2^-131 above where
that is no normal fp32 number.

Left out: a rank that is silent. That is for the group's own timeout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Float32, Float64, Int32, Int64
from torch import Tensor

from fp8rl.quant.errors import KVScaleError, NonFiniteKVError, RankLostError
from fp8rl.quant.kv_scales import QKV, Projection
from fp8rl.quant.shard_agreement import Peers

MANTISSA_BITS: Final = 5  # of the histogram's bins
BIN_SHIFT: Final = 23 - MANTISSA_BITS  # from fp32 bits to a bin
BINS: Final = 1 << (8 + MANTISSA_BITS)
ALL, SATURATED, UNDERFLOWED = range(3)  # columns of `counts`
_INF_BITS: Final = 0x7F800000


@dataclass(frozen=True)
class AttentionShape:
    """Layers and heads of the whole model, over all ranks."""

    layers: int
    q_heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        """Refuse a model without layers or heads."""
        for name, value in vars(self).items():
            if not isinstance(value, int) or value < 1:
                raise KVScaleError(f"{name} must be an integer of at least 1, found {value!r}")

    @property
    def heads(self) -> int:
        """Heads of q, k and v together."""
        return self.q_heads + 2 * self.kv_heads

    def columns(self, x: Projection) -> slice:
        """Where the heads of q, k or v stand among them."""
        start = {"q": 0, "k": self.q_heads, "v": self.q_heads + self.kv_heads}[x]
        return slice(start, start + (self.q_heads if x == "q" else self.kv_heads))


@dataclass(frozen=True)
class KVObservation:
    """What was seen; on one rank, or with `reduced` on all of them."""

    shape: AttentionShape
    amax_bits: Int32[Tensor, "layers heads"]
    tokens_seen: Int64[Tensor, "layers heads"]
    counts: Int64[Tensor, "layers 3 3"]
    histogram: Int64[Tensor, "layers 3 bins"] | None

    def reduced(self, group: dist.ProcessGroup | None = None) -> "KVObservation":
        """Join what all ranks of `group` saw; the same on each of them. A collective.

        `group` holds every trainer rank (all of torch.distributed unless given), whatever part of
        layers, heads and tokens each has. Traffic: one MAX of 4 bytes a head, one SUM of 8 bytes a
        head and a counter.

        Raises:
            ShardError: the ranks observe models of other shapes, or one with a histogram and one
                without.
            RankLostError: a rank has ended (Gloo notices at once, other backends by their timeout).
        """
        try:
            return self._joined(Peers(group))
        except RuntimeError as error:  # backends raise no narrower one
            raise RankLostError(
                "a rank was lost while the ranks joined their KV observations: its own output says "
                f"why it ended; start the run again from its last checkpoint ({error})"
            ) from error

    def beside(self, other: "KVObservation") -> "KVObservation":
        """Join what another observer of the same model saw: other layers, heads or tokens.

        Raises KVScaleError where it was a model of another shape, or only one has a histogram.
        """
        if self.shape != other.shape or (self.histogram is None) != (other.histogram is None):
            raise KVScaleError(
                f"observations of {self.shape} and {other.shape} cannot be joined, nor one with a "
                "histogram and one without"
            )
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return KVObservation(
            self.shape,
            torch.maximum(self.amax_bits, other.amax_bits),
            self.tokens_seen + other.tokens_seen,
            self.counts + other.counts,
            histogram,
        )

    def _joined(self, peers: Peers) -> "KVObservation":
        kind = "without" if self.histogram is None else "with"
        peers.agree([f"KV observation of {self.shape} {kind} a histogram"], None, trouble=False)
        parts = [self.tokens_seen, self.counts]
        parts += [] if self.histogram is None else [self.histogram]
        summed = peers.total(torch.cat([part.flatten() for part in parts]))
        split = torch.split(summed, [part.numel() for part in parts])
        joined = [part.view(old.shape) for part, old in zip(split, parts, strict=True)]
        histogram = joined[2] if self.histogram is not None else None
        return KVObservation(
            self.shape, peers.largest(self.amax_bits), joined[0], joined[1], histogram
        )

    @property
    def tokens(self) -> int:
        """Real tokens that every head of every layer has seen.

        Raises:
            KVScaleError: a layer or some of its heads saw none, or not as many as the others.
        """
        q = self.tokens_seen[:, self.shape.columns("q")]
        most = int(q.max())
        if most == 0:
            raise KVScaleError(
                f"nothing was observed in any of {self.shape.layers} layers; run a forward through "
                "the model while it is watched"
            )
        kv = self.tokens_seen[:, self.shape.q_heads :]
        replicas = max(1, int(kv.max()) // most)
        wrong = [
            f"layer {layer}: {_heads(x, seen, expected)}"
            for layer in range(self.shape.layers)
            for x in QKV
            for expected in [most if x == "q" else most * replicas]
            for seen in [self.tokens_seen[layer, self.shape.columns(x)].tolist()]
            if any(count != expected for count in seen)
        ]
        if wrong:
            layers = sorted({int(line.split()[1][:-1]) for line in wrong})
            raise KVScaleError(
                f"layers {layers} of {self.shape.layers} were not observed as the others were: "
                f"{'; '.join(wrong[:6])}; every rank must observe all its layers on all its tokens"
            )
        return most

    def amax(self) -> Float32[Tensor, "layers 3"]:
        """Return the largest magnitude of q, k and v in each layer.

        Raises:
            KVScaleError: see `tokens`; or a magnitude is not finite, naming layer, tensor and head.
        """
        self._check()
        bits = [self.amax_bits[:, self.shape.columns(x)].amax(1) for x in QKV]
        return torch.stack(bits, dim=1).view(torch.float32).cpu()

    def head_amax(self, layer: int, x: Projection) -> tuple[float, ...]:
        """Largest magnitude of each head of q, k or v in a layer."""
        bits = self.amax_bits[layer, self.shape.columns(x)]
        return tuple(bits.view(torch.float32).tolist())

    def percentile(self, percent: float) -> Float32[Tensor, "layers 3"]:
        """Return the magnitude below or at which `percent` of the elements of q, k and v lie.

        Nearest rank, rounded up to the edge of a bin (see the top of this file), and never above
        the largest magnitude.

        Raises:
            KVScaleError: as `amax`; no histogram was kept; or `percent` is not in (0, 100].
        """
        if not 0 < percent <= 100:
            raise KVScaleError(f"percent must be above 0 and at most 100, found {percent}")
        if self.histogram is None:
            raise KVScaleError("percentiles need KVObserver(shape, histogram=True)")
        amax = self.amax()
        below = self.histogram.cpu().cumsum(dim=2)
        rank = (self.counts[:, :, ALL].cpu().double() * percent / 100).ceil().long()
        bins = torch.searchsorted(below, rank[:, :, None]).squeeze(2)
        edges = ((bins + 1) << BIN_SHIFT).clamp(max=_INF_BITS).to(torch.int32).view(torch.float32)
        return torch.minimum(edges, amax)

    def saturation(self) -> Float64[Tensor, "layers 3"]:
        """Share of the elements beyond 448 times the scale that was in use, which were clipped."""
        return self._share(SATURATED)

    def underflow(self) -> Float64[Tensor, "layers 3"]:
        """Share of the elements that were not 0 and that the scale in use rounds to 0."""
        return self._share(UNDERFLOWED)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict of JSON values, from which `from_json` makes an equal object."""
        histogram = None
        if self.histogram is not None:  # sparse: most of the bins are empty
            where = self.histogram.flatten().nonzero().flatten()
            histogram = [where.tolist(), self.histogram.flatten()[where].tolist()]
        return {
            "shape": vars(self.shape),
            "amax_bits": self.amax_bits.tolist(),
            "tokens_seen": self.tokens_seen.tolist(),
            "counts": self.counts.tolist(),
            "histogram": histogram,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "KVObservation":
        """Read what `to_json` wrote."""
        shape = AttentionShape(**value["shape"])
        histogram = None
        if value["histogram"] is not None:
            where, counts = (torch.tensor(part, dtype=torch.int64) for part in value["histogram"])
            histogram = torch.zeros(shape.layers * len(QKV) * BINS, dtype=torch.int64)
            histogram[where] = counts
            histogram = histogram.view(shape.layers, len(QKV), BINS)
        return cls(
            shape,
            torch.tensor(value["amax_bits"], dtype=torch.int32),
            torch.tensor(value["tokens_seen"], dtype=torch.int64),
            torch.tensor(value["counts"], dtype=torch.int64),
            histogram,
        )

    def _check(self) -> None:
        _ = self.tokens
        bad = (self.amax_bits >= _INF_BITS).nonzero().tolist()
        if bad:
            named = [self._name(layer, head) for layer, head in bad[:6]]
            raise NonFiniteKVError(
                f"NaN or Inf was observed in {len(bad)} head(s): {', '.join(named)}; look for it "
                "in the layer's input or weights"
            )

    def _name(self, layer: int, head: int) -> str:
        x = next(x for x in QKV if head < self.shape.columns(x).stop)
        return f"layer {layer} {x} head {head - self.shape.columns(x).start}"

    def _share(self, column: int) -> Tensor:
        counts = self.counts.cpu().double()
        return counts[:, :, column] / counts[:, :, ALL]


def _heads(x: Projection, seen: list[int], expected: int) -> str:
    """Which heads did not see what they should have."""
    wrong = [head for head, count in enumerate(seen) if count != expected]
    which = "" if len(wrong) == len(seen) else f" heads {wrong}"
    return f"{x}{which} saw {seen[wrong[0]]} of {expected} tokens"


@lru_cache(maxsize=4096)
def largest_bits_at_most(value: float, dtype: torch.dtype) -> int:
    """Bit pattern of the largest number of `dtype` that is at most `value` (not negative)."""
    if math.isinf(value) or value > torch.finfo(dtype).max:
        value = torch.finfo(dtype).max
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    bits = int(rounded.view(BITS_OF[dtype]))
    return bits - 1 if float(rounded) > value else bits


BITS_OF: Final = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
}
