"""The rule that turns observations into KV-cache scales: statistic, memory over steps, headroom.

    magnitude = amax, or the percentile p of |x|            of the batch observed, for each layer
    over steps: latest   that of this version alone
                running  the largest of the last N versions
                ema      decay * before + (1 - decay) * this one
    scale     = magnitude * margin / 448, rounded up        (kv_scales.py)

With a percentile below 100, or an average over steps, some elements of the very batch that was
observed lie beyond the scale and saturate: that is the price of finer steps for the others.

Source: FP8-RL (arXiv 2601.18150), section on KV-cache calibration. The memory over steps is state:
`KVCalibrator.state` goes into checkpoints.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fp8rl.quant.errors import KVScaleError
from fp8rl.quant.kv_observation import AttentionShape, KVObservation
from fp8rl.quant.kv_observer import KVObserver
from fp8rl.quant.kv_scales import QKV, KVScales
from fp8rl.quant.scales import ScaleFormat


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


class Amax(_Frozen):
    """The largest magnitude of any element."""

    kind: Literal["amax"] = "amax"


class Percentile(_Frozen):
    """The magnitude that `percent` of the elements do not exceed."""

    kind: Literal["percentile"] = "percentile"
    percent: float = Field(default=99.99, gt=0, le=100)


class Latest(_Frozen):
    """Nothing is remembered: the scales are those of the batch observed."""

    kind: Literal["latest"] = "latest"


class RunningMax(_Frozen):
    """The largest magnitude of the last `steps` versions, this one included."""

    kind: Literal["running_max"] = "running_max"
    steps: int = Field(default=8, ge=1)


class EMA(_Frozen):
    """Exponential moving average over versions; the first one starts it."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.9, ge=0, lt=1)


class KVScaleRule(_Frozen):
    """How observations become scales; the defaults are amax of each version, powers of two."""

    observer: Annotated[Amax | Percentile, Field(discriminator="kind")] = Amax()
    over_steps: Annotated[Latest | RunningMax | EMA, Field(discriminator="kind")] = Latest()
    margin: float = Field(default=1.0, ge=1.0, description="headroom above the magnitude")
    scale_format: ScaleFormat = "pow2"

    @property
    def name(self) -> str:
        """The rule in words, for the scales' provenance."""
        statistic = "amax"
        if isinstance(self.observer, Percentile):
            statistic = f"percentile {self.observer.percent:g}"
        if isinstance(self.over_steps, RunningMax):
            return f"{statistic}, running maximum of {self.over_steps.steps} versions"
        if isinstance(self.over_steps, EMA):
            return f"{statistic}, moving average with decay {self.over_steps.decay:g}"
        return statistic


class KVCalibrator:
    """Makes the scales of each version by one rule, and remembers what the rule needs."""

    def __init__(self, rule: KVScaleRule, shape: AttentionShape) -> None:
        self.rule = rule
        self.shape = shape
        self._history = torch.empty(0, shape.layers, len(QKV))

    @property
    def needs_histogram(self) -> bool:
        """Whether an observer must keep a histogram for this rule."""
        return isinstance(self.rule.observer, Percentile)

    def observer(self) -> KVObserver:
        """Return a fresh observer of what this rule needs."""
        return KVObserver(self.shape, histogram=self.needs_histogram)

    def scales(self, observation: KVObservation, version: int) -> KVScales:
        """Make the scales of `version` from what was observed on it, over all ranks.

        Raises KVScaleError naming the layers that were not seen, or hold NaN, Inf or zeros only;
        what is remembered then stays as it was.
        """
        rule = self.rule
        if isinstance(rule.observer, Percentile):
            found = observation.percentile(rule.observer.percent)
        else:
            found = observation.amax()
        _refuse_zeros(found)  # what is remembered would hide them
        history = self._remembered(found)
        made = KVScales.from_amax(
            history.amax(0) if isinstance(rule.over_steps, RunningMax) else history[-1],
            version=version,
            tokens=observation.tokens,
            margin=rule.margin,
            observer=rule.name,
            scale_format=rule.scale_format,
            head_amax=[
                [observation.head_amax(layer, x) for x in QKV] for layer in range(self.shape.layers)
            ],
        )
        self._history = history
        return made

    def state(self) -> dict[str, Float32[Tensor, "versions layers 3"]]:
        """Return what is remembered over steps, for a checkpoint."""
        return {"history": self._history.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned. Raises KVScaleError if it is of another model."""
        history = state["history"]
        if history.ndim != 3 or history.shape[1:] != self._history.shape[1:]:
            raise KVScaleError(
                f"the calibration history is {list(history.shape)}, expected [versions, "
                f"{self.shape.layers}, {len(QKV)}]; load it into the model it was saved from"
            )
        self._history = history.clone()

    def _remembered(self, found: Tensor) -> Tensor:
        """The history with `found` in it: the last versions, or the average as one entry."""
        over_steps = self.rule.over_steps
        if isinstance(over_steps, RunningMax):
            return torch.cat([self._history, found[None]])[-over_steps.steps :]
        if isinstance(over_steps, EMA) and len(self._history):
            return torch.lerp(found, self._history[-1], over_steps.decay)[None]
        return found[None]


def _refuse_zeros(found: Tensor) -> None:
    """Refuse what no scale covers; a percentile of zeros is subnormal, the edge of its bin."""
    zeros = (found < torch.finfo(torch.float32).tiny).nonzero().tolist()
    if zeros:
        named = [f"layer {layer} {QKV[column]}" for layer, column in zeros]
        raise KVScaleError(
            f"only zeros were observed in {', '.join(named[:6])} ({len(zeros)} in all), which no "
            "scale can be made of; look at the layer's weights, or raise the percentile"
        )
