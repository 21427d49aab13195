"""The observer of q, k and v: element-level magnitudes of every real token, for KV calibration.

    amax[layer, head]   = max over tokens and channels of |x|
    saturated           = elements with          |x| > 448 * scale
    underflowed         = elements with 0 < |x| <= 2^-10 * scale     (E4M3 rounds them to 0)

q and k are to be observed after QK-norm and RoPE, as they enter the cache. Padding is left out by a
mask and changes nothing, NaN there neither. Magnitudes are read as integers: the bits of a number
without its sign order like its magnitude. Nothing waits for the device, but for the histogram's
bincount; what is wrong with the values is said when they are asked for (`KVObservation`), on every
rank alike. A layer's observation is a few operations on q, k and v, which small models feel, in
pieces that stay in a CPU's cache, which large ones do.

Source: FP8-RL (arXiv 2601.18150), calibration of the KV cache. Left out: rules that make scales of
what was seen (kv_rule.py), and where q, k and v come from (fp8rl.sync).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fp8rl.quant.errors import KVScaleError
from fp8rl.quant.kv_observation import (
    ALL,
    BIN_SHIFT,
    BINS,
    BITS_OF,
    SATURATED,
    UNDERFLOWED,
    AttentionShape,
    KVObservation,
    largest_bits_at_most,
)
from fp8rl.quant.kv_scales import QKV, KVScales, Projection
from fp8rl.quant.scales import E4M3_MAX

UNDERFLOW: Final = 2.0**-10  # half of E4M3's smallest number; a tie rounds to 0
PIECE: Final = 1 << 18  # elements of q looked at together, so that they stay in a CPU's cache

Parts = tuple[Tensor, Tensor, Tensor]  # q, k, v


class _Heads(NamedTuple):
    """Heads of one layer that are observed together, as one rank holds them."""

    layer: int
    first_q: int
    q: int
    first_kv: int
    kv: int
    dtype: torch.dtype

    def columns(self, shape: AttentionShape) -> list[slice]:
        """Where q, k and v of these heads stand in a `KVObservation`."""
        q, kv = (self.first_q, self.q), (self.first_kv, self.kv)
        held: dict[Projection, tuple[int, int]] = {"q": q, "k": kv, "v": kv}
        found = []
        for x, (start, heads) in held.items():
            whole = shape.columns(x)
            of_model = whole.stop - whole.start
            if start < 0 or start + heads > of_model:
                raise KVScaleError(
                    f"layer {self.layer}: {x} has heads {start}..{start + heads - 1}, but the "
                    f"model has {of_model} heads of {x}"
                )
            found.append(slice(whole.start + start, whole.start + start + heads))
        return found


@dataclass
class _Seen:
    """What some heads have shown so far, on their own device."""

    channels: list[int]  # of a head of q, k, v
    tokens: Tensor | int
    largest: Tensor  # [heads of q, k, v] bits of the largest magnitude, in the tensors' own width
    beyond: Tensor  # int64 [3, 2] elements of q, k, v that saturated and underflowed
    histogram: Tensor  # int64 [3, bins], empty where none is kept


class KVObserver:
    """Collects what layers feed it into a `KVObservation`; one for each weight version."""

    def __init__(
        self, shape: AttentionShape, *, histogram: bool = False, in_use: KVScales | None = None
    ) -> None:
        """Start with nothing seen.

        Args:
            shape: layers and heads of the whole model, over all ranks.
            histogram: keep one of each layer's q, k and v, for percentiles.
            in_use: scales against which saturation and underflow are counted.
        """
        if in_use is not None and len(in_use.layers) != shape.layers:
            raise KVScaleError(
                f"the scales in use are of {len(in_use.layers)} layers, the model has "
                f"{shape.layers}"
            )
        self.shape = shape
        self._in_use = None if in_use is None else in_use.scales().tolist()
        self._bins = BINS if histogram else 0
        self._seen: dict[_Heads, _Seen] = {}

    def observe(
        self,
        layer: int,
        q: Float[Tensor, "*tokens q_heads d"],
        k: Float[Tensor, "*tokens kv_heads d"],
        v: Float[Tensor, "*tokens kv_heads dv"],
        mask: Bool[Tensor, "*tokens"] | None = None,
        *,
        first_q_head: int = 0,
        first_kv_head: int = 0,
    ) -> None:
        """Take in q [.., Hq, D], k and v [.., Hkv, D] of one layer; leading dimensions are tokens.

        `layer` is the global layer number; the heads are those from `first_q_head` and
        `first_kv_head` on of the whole model, which a tensor-parallel rank holds. `mask` [..] is
        True at real tokens; what stands at the others, NaN too, changes nothing.

        Raises KVScaleError for an unknown layer, heads outside of the model, a dtype that is not
        bf16, fp16 or fp32, and shapes that do not fit.
        """
        parts = (q, k, v)
        shapes, dtype = [x.shape for x in parts], q.dtype
        self._check(layer, parts, shapes, mask)
        heads = _Heads(layer, first_q_head, shapes[0][-2], first_kv_head, shapes[1][-2], dtype)
        seen = self._seen.get(heads)
        if seen is None:
            seen = self._seen[heads] = self._nothing(heads, shapes, q.device)
        seen.tokens = seen.tokens + (shapes[0][:-2].numel() if mask is None else mask.sum())
        for piece, kept in _pieces(parts, shapes[0], _bits_kept(dtype, mask)):
            self._take(heads, seen, piece, kept)

    def observation(self) -> KVObservation:
        """Return what was seen so far, on the CPU."""
        shape, kinds = self.shape, range(len(QKV))
        amax_bits = [[0] * shape.heads for _ in range(shape.layers)]
        tokens = [[0] * shape.heads for _ in range(shape.layers)]
        counts = [[[0, 0, 0] for _ in kinds] for _ in range(shape.layers)]
        histogram = torch.zeros(shape.layers, len(QKV), self._bins, dtype=torch.int64)
        for heads, seen in self._seen.items():
            layer, real, beyond = heads.layer, int(seen.tokens), seen.beyond.tolist()
            largest = iter(seen.largest.view(heads.dtype).float().view(torch.int32).tolist())
            for x, columns in enumerate(heads.columns(shape)):
                for head in range(columns.start, columns.stop):
                    amax_bits[layer][head] = max(amax_bits[layer][head], next(largest))
                    tokens[layer][head] += real
                counts[layer][x][ALL] += real * (columns.stop - columns.start) * seen.channels[x]
                counts[layer][x][SATURATED] += beyond[x][0]
                counts[layer][x][UNDERFLOWED] += beyond[x][1]
            if self._bins:
                histogram[layer] += seen.histogram.cpu()
        elements = torch.tensor(counts)
        if self._bins:  # the zeros that stand for padding
            histogram[:, :, 0] -= histogram.sum(2) - elements[:, :, ALL]
        return KVObservation(
            shape,
            torch.tensor(amax_bits, dtype=torch.int32),
            torch.tensor(tokens),
            elements,
            histogram if self._bins else None,
        )

    def _nothing(self, heads: _Heads, shapes: list[torch.Size], device: torch.device) -> _Seen:
        heads.columns(self.shape)  # raises where the model has no such heads
        total, kinds = heads.q + 2 * heads.kv, len(QKV)
        return _Seen(
            [shape[-1] for shape in shapes],
            0,
            torch.zeros(total, dtype=BITS_OF[heads.dtype], device=device),
            torch.zeros(kinds, 2, dtype=torch.int64, device=device),
            torch.zeros(kinds, self._bins, dtype=torch.int64, device=device),
        )

    def _take(self, heads: _Heads, seen: _Seen, parts: Parts, kept: Tensor | int) -> None:
        """Join q, k and v [.., H, D] to what was seen."""
        of_parts = [x.view(BITS_OF[heads.dtype]) & kept for x in parts]
        largest = torch.cat([_largest(bits) for bits in of_parts])
        torch.maximum(seen.largest, largest, out=seen.largest)
        if self._in_use is not None:
            scales = self._in_use[heads.layer]
            beyond = [
                count
                for bits, scale in zip(of_parts, scales, strict=True)
                for count in _beyond(bits, scale, heads.dtype)
            ]
            seen.beyond += torch.stack(beyond).view_as(seen.beyond)
        if self._bins:
            for column, bits in enumerate(of_parts):
                found = torch.bincount(_bins(bits, heads.dtype).flatten(), minlength=BINS)
                seen.histogram[column] += found

    def _check(
        self, layer: int, parts: Parts, shapes: list[torch.Size], mask: Tensor | None
    ) -> None:
        if not 0 <= layer < self.shape.layers:
            raise KVScaleError(f"layer must be in 0..{self.shape.layers - 1}, found {layer}")
        lead = shapes[0][:-2]
        if any(len(shape) < 3 or shape[:-2] != lead for shape in shapes) or (
            shapes[1][-2] != shapes[2][-2]
        ):
            found = {x: tuple(shape) for x, shape in zip(QKV, shapes, strict=True)}
            raise KVScaleError(
                f"layer {layer}: q, k and v must be [tokens.., heads, channels] of the same "
                f"tokens, k and v of the same heads, found {found}"
            )
        dtypes = [x.dtype for x in parts]
        for name, dtype in zip(QKV, dtypes, strict=True):
            if dtype not in BITS_OF or dtype != dtypes[0]:
                raise KVScaleError(
                    f"layer {layer}: {name} is {dtype}, expected bfloat16, float16 or float32, and "
                    "that of q, k and v alike: observe it before it is quantized"
                )
        if mask is not None and (mask.shape != lead or mask.dtype != torch.bool):
            raise KVScaleError(
                f"layer {layer}: mask must be bool {tuple(lead)}, "
                f"found {mask.dtype} {tuple(mask.shape)}"
            )


def _bits_kept(dtype: torch.dtype, mask: Tensor | None) -> Tensor | int:
    """Which bits make a magnitude: all but the sign, [.., 1, 1]; none where the mask is False."""
    integers = BITS_OF[dtype]
    magnitude = torch.iinfo(integers).max
    return magnitude if mask is None else (mask.to(integers) * magnitude)[..., None, None]


def _pieces(
    parts: Parts, shape: torch.Size, kept: Tensor | int
) -> Iterator[tuple[Parts, Tensor | int]]:
    """Cut q, k and v by tokens into pieces that stay in a CPU's cache; a GPU takes them whole."""
    size = shape.numel()
    if size <= PIECE or parts[0].is_cuda:
        return iter([(parts, kept)] if size else [])
    longest = max(range(len(shape) - 2), key=lambda dim: shape[dim])
    count = -(-size // PIECE)
    q, k, v = (x.chunk(count, longest) for x in parts)
    keep = [kept] * len(q) if isinstance(kept, int) else kept.chunk(count, longest)
    return zip(zip(q, k, v, strict=True), keep, strict=True)


def _largest(bits: Tensor) -> Tensor:
    """The largest of each head [H] of [.., H, D]; dimension by dimension, which is fast."""
    for _ in range(bits.ndim - 2):
        bits = bits.amax(0)
    return bits.amax(-1)


def _beyond(bits: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How many magnitudes saturate with a scale, and how many but zeros it rounds to zero."""
    limit = largest_bits_at_most(E4M3_MAX * scale, dtype)
    floor = largest_bits_at_most(UNDERFLOW * scale, dtype)
    lost = bits.clamp_max(1).sub_(_above(bits, floor))  # zeros, padding among them, are not lost
    return _count(_above(bits, limit)), _count(lost)


def _above(bits: Tensor, limit: int) -> Tensor:
    """1 where a magnitude exceeds ``limit``, else 0; comparing integers is slower on a CPU."""
    return bits.clamp(limit, limit + 1).sub_(limit)


def _count(ones: Tensor) -> Tensor:
    """The sum of [.., D] ones and zeros, channels first in their own type: widening is slow."""
    return ones.sum(-1, dtype=ones.dtype).sum()


def _bins(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The histogram bins of magnitudes given by their bits in `dtype`."""
    if dtype == torch.bfloat16:  # the upper half of an fp32 number
        return bits >> (BIN_SHIFT - 16)
    return bits.view(dtype).float().view(torch.int32) >> BIN_SHIFT
