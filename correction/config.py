"""Configuration of the correction and of the loss: frozen records, told apart by `kind`.

    correction: {kind: tis, level: token, cap: 2.0}

Bounds are bounds on the importance ratio `r = p_train / p_rollout` itself, never on `1 / r` or on
its logarithm.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Level = Literal["token", "sequence", "geometric"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoCorrection(_Frozen):
    """Every token has weight 1; the mismatch is still measured."""

    kind: Literal["none"] = "none"


class TIS(_Frozen):
    """Truncated importance sampling: weight `min(r, cap)`."""

    kind: Literal["tis"] = "tis"
    level: Level = "token"
    cap: float = Field(default=2.0, gt=0)


class MIS(_Frozen):
    """Masked importance sampling: weight `r` inside `[low, high]`, outside the token is dropped."""

    kind: Literal["mis"] = "mis"
    level: Level = "token"
    low: float = Field(default=0.5, ge=0)
    high: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(
                f"low = {self.low} and high = {self.high}: low must be below high; "
                "both bound the ratio p_train / p_rollout"
            )
        return self


CorrectionConfig = Annotated[NoCorrection | TIS | MIS, Field(discriminator="kind")]


class PolicyLossConfig(_Frozen):
    """Clip range `[1 - clip_low, 1 + clip_high]` of the policy ratio; the defaults are DAPO's."""

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.28, ge=0)
