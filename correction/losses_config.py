"""The configuration of the policy loss: which objective, how it is aggregated, what it leaves out.

    loss: {kind: ppo_clip, clip_low: 0.2, clip_high: 0.28, aggregation: token-mean}
    loss: {preset: gspo}

The presets are GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr.GRPO (2503.20783), GSPO (2507.18071)
and CISPO (2506.13585); bounds that a paper does not print are DAPO's. Dr.GRPO is also advantages
without division by the standard deviation: `group_advantages(..., normalize=False)`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from fp8rl.correction.stages import Frozen

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


class MasteredTokens(Frozen):
    """Leave out well-mastered positive tokens (UloRL, arXiv 2507.19766).

    While the policy's mean token entropy, in nats, is below `entropy`, tokens of positive advantage
    that the policy gives at least `probability` are dropped; they leave the denominator.
    """

    probability: float = Field(default=0.99, gt=0, le=1)
    entropy: float = Field(default=0.2, gt=0)


class _Loss(Frozen):
    """What every loss has."""

    aggregation: Aggregation = "token-mean"
    max_tokens: PositiveInt | None = Field(
        default=None, description="constant length that seq-mean-token-sum-norm divides by"
    )
    mastered: MasteredTokens | None = None

    @model_validator(mode="after")
    def _norm_has_length(self) -> Self:
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.max_tokens is not None):
            raise ValueError(
                f"aggregation is {self.aggregation} and max_tokens is {self.max_tokens}: give "
                "max_tokens, the longest response, with seq-mean-token-sum-norm and only with it"
            )
        return self


class PPOClip(_Loss):
    """PPO's clipped surrogate (arXiv 1707.06347); the defaults are DAPO's.

    `dual_clip` bounds from above the ratio that a token of negative advantage is charged
    (arXiv 1912.09729); None leaves it unbounded.
    """

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.28, ge=0)
    dual_clip: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _dual_clip_acts(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip = {self.dual_clip} is not above 1 + clip_high = {1 + self.clip_high}"
            )
        return self


class GSPO(_Loss):
    """PPO's clip on the geometric mean of a sequence's ratios (arXiv 2507.18071, GSPO-token)."""

    kind: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    clip_high: float = Field(default=4e-4, ge=0)
    aggregation: Aggregation = "seq-mean-token-mean"


class CISPO(_Loss):
    """REINFORCE weighted by the clipped ratio, which carries no gradient (arXiv 2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    clip_low: float = Field(default=1.0, ge=0, le=1)
    clip_high: float = Field(default=0.28, ge=0)


class Reinforce(_Loss):
    """`-w A log pi`: no ratio and no clip, only the correction's weight."""

    kind: Literal["reinforce"] = "reinforce"


LOSS_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"kind": "ppo_clip", "clip_high": 0.2, "aggregation": "seq-mean-token-mean"},
        "dapo": {"kind": "ppo_clip", "clip_high": 0.28, "aggregation": "token-mean"},
        "dr_grpo": {"kind": "ppo_clip", "clip_high": 0.2, "aggregation": "seq-mean-token-sum-norm"},
        "gspo": {"kind": "gspo"},
        "cispo": {"kind": "cispo"},
    }
)


def _expand_preset(value: Any) -> Any:
    """A preset's settings, with what is given beside its name; `kind` may be left out."""
    if not isinstance(value, Mapping):
        return value
    rest = {key: each for key, each in value.items() if key != "preset"}
    if "preset" not in value:
        return {"kind": "ppo_clip"} | rest
    if not isinstance(value["preset"], str) or value["preset"] not in LOSS_PRESETS:
        raise ValueError(f"preset {value['preset']!r} is not one of {', '.join(LOSS_PRESETS)}")
    if "kind" in rest:
        raise ValueError(f"preset {value['preset']!r} stands for a kind; leave out kind")
    return {**LOSS_PRESETS[value["preset"]], **rest}


LossConfig = Annotated[
    Annotated[PPOClip | GSPO | CISPO | Reinforce, Field(discriminator="kind")],
    BeforeValidator(_expand_preset),
]
