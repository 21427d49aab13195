"""KV-cache scales of one weight version: what was measured, and what the engine is to use.

    pow2:  scale = the smallest power of two >= magnitude * margin / 448     (the default)
    fp32:  scale = magnitude * margin / 448, rounded up to fp32

for q, k and v of each layer. Powers of two are exact in bf16, in which an engine may hold scales it
loads by itself. `magnitude * margin` is one fp32 product. A `KVScales` says on which weight
version, by which observer and on how many tokens it was measured; every layer is in it. There is no
default of 1.0: a layer that was not seen, or saw only zeros, is an error.

Scales are for each tensor. The largest magnitude of each head is kept beside them as data: vLLM
0.32 cannot reload scales for each head.

Source: FP8-RL (arXiv 2601.18150), recalibration of q, k, v scales in each step; the names are those
vLLM loads. Left out: attention whose cache is no k and v (MLA).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from fp8rl.quant.errors import KVScaleError
from fp8rl.quant.scales import E4M3_MAX, ScaleFormat, pow2_scale_inv

Projection = Literal["q", "k", "v"]
QKV: Final[tuple[Literal["q"], Literal["k"], Literal["v"]]] = ("q", "k", "v")


@dataclass(frozen=True)
class TensorScale:
    """The scale of q, k or v in one layer; all floats are exact fp32 values.

    magnitude: what the scale covers, before the margin: the observer's statistic, over steps.
    head_amax: largest magnitude of each head in the batch observed; empty where not known.
    """

    scale: float
    magnitude: float
    head_amax: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a scale or magnitude that is no finite float above 0."""
        for name, value in (("scale", self.scale), ("magnitude", self.magnitude)):
            if not (isinstance(value, float) and math.isfinite(value) and value > 0):
                raise KVScaleError(
                    f"{name} must be a finite float above 0, found {value!r}; measure it again"
                )
        if not all(isinstance(x, float) and math.isfinite(x) and x >= 0 for x in self.head_amax):
            raise KVScaleError(f"head_amax must be finite floats, found {list(self.head_amax)}")


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer."""

    q: TensorScale
    k: TensorScale
    v: TensorScale


@dataclass(frozen=True)
class KVScales:
    """Scales of every layer, in order of the global layer number, and where they come from.

    version: weight version they were measured on. observer: how the magnitudes were taken. tokens:
    how many tokens were seen. margin: headroom factor put on the magnitudes.
    """

    version: int
    observer: str
    tokens: int
    margin: float
    layers: tuple[LayerScales, ...]

    def __post_init__(self) -> None:
        """Refuse scales without a version, an observer, tokens, a margin or layers."""
        for name, least in (("version", 0), ("tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise KVScaleError(f"{name} must be an integer >= {least}, found {value!r}")
        if not isinstance(self.margin, float) or not 0 < self.margin < math.inf:
            raise KVScaleError(f"margin must be a finite float above 0, found {self.margin!r}")
        if not isinstance(self.observer, str) or not self.observer:
            raise KVScaleError(f"observer must be a name, found {self.observer!r}")
        if not self.layers:
            raise KVScaleError("KV scales of a model must hold at least one layer, found none")

    @classmethod
    def from_amax(
        cls,
        amax: Float32[Tensor, "layers 3"],
        *,
        version: int,
        tokens: int,
        margin: float = 1.0,
        observer: str = "amax",
        scale_format: ScaleFormat = "pow2",
        head_amax: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> "KVScales":
        """Make scales from fp32 magnitudes `amax` [L, 3], whose columns are q, k and v.

        `head_amax[layer][column]` are the magnitudes of the heads, kept as data.

        Raises KVScaleError naming layer and tensor where amax is negative, zero, not finite, or not
        finite after `margin`.
        """
        if amax.ndim != 2 or amax.shape[1] != len(QKV) or amax.dtype != torch.float32:
            raise KVScaleError(
                f"amax must be float32 [layers, 3], found {amax.dtype} {tuple(amax.shape)}"
            )
        amax = amax.detach().cpu()
        product = amax * margin
        bad = ~((amax > 0) & torch.isfinite(product) & (product > 0))
        if bool(bad.any()):
            layer, column = bad.nonzero()[0].tolist()
            raise KVScaleError(
                f"layer {layer}, {QKV[column]}: amax is {float(amax[layer, column])} (times margin "
                f"{margin}), which must be finite and above 0; {int(bad.sum())} of {bad.numel()} "
                "entries are bad. Observe every layer on real tokens before making scales."
            )
        heads = head_amax or [[()] * len(QKV)] * len(amax)
        scale = pow2_scale_inv(product) if scale_format == "pow2" else _fp32_scale(product)
        layers = tuple(
            LayerScales(*(TensorScale(s, a, tuple(h)) for s, a, h in zip(*row, strict=True)))
            for row in zip(scale.tolist(), amax.tolist(), heads, strict=True)
        )
        return cls(version, observer, tokens, float(margin), layers)

    def scales(self) -> Float32[Tensor, "layers 3"]:
        """Return the scales as a tensor, whose columns are q, k and v."""
        rows = [[getattr(layer, x).scale for x in QKV] for layer in self.layers]
        return torch.tensor(rows, dtype=torch.float32)

    def tensors(self) -> dict[str, Float32[Tensor, "1"]]:
        """Return the scales as the engine loads them: `model.layers.{i}.self_attn.attn.k_scale`."""
        return {
            kv_scale_name(i, x): torch.tensor([getattr(layer, x).scale], dtype=torch.float32)
            for i, layer in enumerate(self.layers)
            for x in QKV
        }

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict of JSON values, from which `from_json` makes an equal object."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "KVScales":
        """Read what `to_json` wrote. Raises KVScaleError on missing, unknown or wrong fields."""
        _check_keys(value, cls, "KV scales")
        layers = value["layers"]
        if not isinstance(layers, list):
            raise KVScaleError(f"layers must be a list, found {type(layers).__name__}")
        return cls(**{**value, "layers": tuple(_layer(i, x) for i, x in enumerate(layers))})


def kv_scale_name(layer: int, x: Projection) -> str:
    """Name under which the engine loads the scale of q, k or v of a (global) layer."""
    return f"model.layers.{layer}.self_attn.attn.{x}_scale"


def _fp32_scale(product: Tensor) -> Tensor:
    """The smallest fp32 number by which `product` divides to 448 or less."""
    scale = torch.div(product, E4M3_MAX).clamp(min=2.0**-126)
    short = scale.double() * E4M3_MAX < product.double()
    return torch.where(short, torch.nextafter(scale, torch.tensor(math.inf)), scale)


def _layer(index: int, value: object) -> LayerScales:
    _check_keys(value, LayerScales, f"KV scales of layer {index}")
    found = {}
    for x in QKV:
        what = f"KV scale of layer {index}, {x}"
        _check_keys(value[x], TensorScale, what)  # type: ignore[index]  # it has the keys
        entry = dict(value[x])  # type: ignore[index]
        if not isinstance(entry["head_amax"], list | tuple):
            raise KVScaleError(f"{what}: head_amax must be a list, found {entry['head_amax']!r}")
        try:
            found[x] = TensorScale(**{**entry, "head_amax": tuple(entry["head_amax"])})
        except KVScaleError as error:
            raise KVScaleError(f"{what}: {error}") from error
    return LayerScales(**found)


def _check_keys(value: object, record: type, what: str) -> None:
    expected = {field.name for field in fields(record)}
    if not isinstance(value, Mapping) or set(value) != expected:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise KVScaleError(f"{what} must have the fields {sorted(expected)}, found {found}")
