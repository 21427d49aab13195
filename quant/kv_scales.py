"""KV-cache scales of one weight version: what was measured, and what the engine is to use.

    scale = the smallest power of two >= amax * margin / 448        for q, k and v of each layer

Powers of two are exact in bf16, in which an engine may hold them on first load. `amax * margin` is
one fp32 product. A `KVScales` says on which weight version, by which observer and on how many
tokens it was measured; every layer is in it. There is no default of 1.0: a layer that was not seen,
or saw only zeros, is an error.

Source: FP8-RL (arXiv 2601.18150), recalibration of q, k, v scales in each step; the names are those
vLLM loads. Left out: scales for each head.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from fp8rl.quant.errors import KVScaleError
from fp8rl.quant.scales import pow2_scale_inv

QKV: Final[tuple[Literal["q"], Literal["k"], Literal["v"]]] = ("q", "k", "v")


@dataclass(frozen=True)
class LayerScales:
    """Largest magnitude and scale of q, k and v in one layer; the floats are exact fp32 values."""

    q_amax: float
    k_amax: float
    v_amax: float
    q_scale: float
    k_scale: float
    v_scale: float

    def __post_init__(self) -> None:
        """Refuse anything but finite floats above 0."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, float) and math.isfinite(value) and value > 0):
                raise KVScaleError(
                    f"{field.name} must be a finite float above 0, found {value!r}; "
                    "measure it again"
                )


@dataclass(frozen=True)
class KVScales:
    """Scales of every layer, in order of the global layer number, and where they come from.

    version: weight version they were measured on. observer: how amax was taken. tokens: how many
    tokens were seen. margin: headroom factor put on amax.
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
    ) -> "KVScales":
        """Make scales from fp32 `amax` [L, 3], whose columns are q, k and v.

        Raises KVScaleError naming layer and tensor where amax is negative (never observed), zero,
        not finite, or not finite after `margin`.
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
                f"{margin}), which must be finite and above 0 (-1 means never observed); "
                f"{int(bad.sum())} of {bad.numel()} entries are bad. Observe every layer on real "
                "tokens before making scales."
            )
        rows = torch.cat([amax, pow2_scale_inv(product)], dim=1).tolist()
        layers = tuple(LayerScales(*row) for row in rows)
        return cls(version, observer, tokens, float(margin), layers)

    def tensors(self) -> dict[str, Float32[Tensor, "1"]]:
        """Return the scales as the engine loads them: `model.layers.{i}.self_attn.attn.k_scale`."""
        return {
            kv_scale_name(i, x): torch.tensor([getattr(layer, f"{x}_scale")], dtype=torch.float32)
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
        for index, layer in enumerate(layers):
            _check_keys(layer, LayerScales, f"KV scales of layer {index}")
        return cls(**{**value, "layers": tuple(LayerScales(**layer) for layer in layers)})


def kv_scale_name(layer: int, x: Literal["q", "k", "v"]) -> str:
    """Name under which the engine loads the scale of q, k or v of a (global) layer."""
    return f"model.layers.{layer}.self_attn.attn.{x}_scale"


def _check_keys(value: object, record: type, what: str) -> None:
    expected = {field.name for field in fields(record)}
    if not isinstance(value, Mapping) or set(value) != expected:
        found = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise KVScaleError(f"{what} must have the fields {sorted(expected)}, found {found}")
