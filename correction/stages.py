"""What a correction consists of: a list of typed stages, told apart by `kind`.

    correction:
      stages:
        - {kind: reject, divergence: k1, level: seq_mean, low: 0.999, high: 1.001}
        - {kind: tis, level: token, cap: 2.0}

Three kinds of stage, applied in the order given:

    weights     tis, mis, icepop: give every token its weight; at most one of them
    rejection   reject, veto (and mis): take tokens or whole sequences out of the loss
    rescaling   batch_normalize, ess_mixing: change weights that an earlier stage gave

Bounds are bounds on the importance ratio `r = p_train / p_rollout` itself, never on `1 / r` or on
its logarithm, and lie where ratios do, in [1e-8, 1e8]; those of k2 and k3 are bounds on the
divergence, in nats. Every ratio is taken over
the mask as the batch came, whatever earlier stages rejected, so that their order does not matter;
rescaling stages come last.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# a token's log-ratio is clamped to +-20, that is its ratio to [2.1e-9, 4.9e8]: a bound beyond would
# never act
SMALLEST_BOUND, LARGEST_BOUND = 1e-8, 1e8


def _zero_or_reached(low: float) -> float:
    if 0 < low < SMALLEST_BOUND:
        raise ValueError(f"{low} is below {SMALLEST_BOUND}, which no ratio is; use 0 for no bound")
    return low


Low = Annotated[float, Field(ge=0), AfterValidator(_zero_or_reached)]
High = Annotated[float, Field(gt=0, le=LARGEST_BOUND)]
Level = Literal["token", "sequence", "geometric"]
Divergence = Literal["k1", "k2", "k3"]
RejectLevel = Literal["token", "seq_sum", "seq_mean", "seq_max"]


class Frozen(BaseModel):
    """Base of this room's records: immutable; unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TIS(Frozen):
    """Truncated importance sampling: weight `min(r, cap)` (Yao et al. 2025; arXiv 2601.18150)."""

    kind: Literal["tis"] = "tis"
    level: Level = "token"
    cap: High = 2.0


class _Band(Frozen):
    """Bounds on a ratio."""

    low: Low = 0.5
    high: High = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(
                f"low = {self.low} and high = {self.high}: low must be below high; "
                "both bound the ratio p_train / p_rollout"
            )
        return self


class MIS(_Band):
    """Masked importance sampling: weight `r` in `[low, high]`; outside, the token is dropped.

    A dropped token (at `sequence` and `geometric` level: sequence) leaves the loss's denominator.
    """

    kind: Literal["mis"] = "mis"
    level: Level = "token"


class IcePop(_Band):
    """IcePop: weight `r` in `[low, high]`, 0 outside, and the token stays in the denominator.

    Defaults and definition of "Small Leak Can Sink a Great Ship" (Ling team, 2025).
    """

    kind: Literal["icepop"] = "icepop"
    level: Level = "token"
    high: High = 5.0


class Reject(Frozen):
    """Drop the tokens or sequences whose divergence from the sampler is out of bounds.

    With `lr = log r` of each token, Schulman's estimators `k1 = -lr`, `k2 = lr^2 / 2` and
    `k3 = r - 1 - lr`, summed (`seq_sum`), averaged (`seq_mean`) or maximized (`seq_max`) over a
    sequence, which is then dropped whole. For k1 the bounds are on the ratio: a token's `r`, a
    sequence's `exp(sum lr)` or `exp(mean lr)`, and with `seq_max` on every token's `r`. For k2 and
    k3 `high` bounds the divergence; they have no `low`.
    """

    kind: Literal["reject"] = "reject"
    divergence: Divergence = "k1"
    level: RejectLevel = "token"
    low: Low | None = None
    high: High

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.divergence != "k1":
            if self.low is not None:
                raise ValueError(f"low = {self.low}: {self.divergence} is bounded by high alone")
        elif self.low is None:
            raise ValueError("low is missing: k1 is bounded by low and high, both of the ratio")
        elif self.low >= self.high:
            raise ValueError(
                f"low = {self.low} and high = {self.high}: low must be below high; "
                "both bound the ratio p_train / p_rollout"
            )
        return self

    @property
    def name(self) -> str:
        """veRL's name of this criterion, such as `seq_mean_k3`."""
        return f"{self.level}_{self.divergence}"


class Veto(Frozen):
    """Drop every sequence in which some token's ratio is below `floor`.

    Such a token is one that the trainer holds for nearly impossible: the sampler slipped, and
    what follows it is off the policy's path.
    """

    kind: Literal["veto"] = "veto"
    floor: float = Field(default=1e-4, ge=SMALLEST_BOUND, lt=1)

    @property
    def name(self) -> str:
        """How metrics call it."""
        return "veto"


class BatchNormalize(Frozen):
    """Divide the weights by their mean over the batch, so that they average 1.

    The mean is over kept tokens (`token`) or, each counting once, over sequences of which a token
    is kept (`sequence`); with a process group, over all its ranks. A mean of 0 changes nothing.
    """

    kind: Literal["batch_normalize"] = "batch_normalize"
    level: Literal["token", "sequence"] = "token"


class ESSMixing(Frozen):
    """Move the weights towards 1 just until their effective sample size reaches `target`.

    `w' = 1 + lambda (w - 1)` over the batch's kept tokens with the largest lambda in [0, 1] for
    which `(mean w')^2 / mean(w'^2) >= target`: full correction while it is reliable, none when
    single tokens would carry the batch. Our own; not AIS (arXiv 2605.13907).
    """

    kind: Literal["ess_mixing"] = "ess_mixing"
    target: float = Field(default=0.9, gt=0, lt=1)


Stage = Annotated[
    TIS | MIS | IcePop | Reject | Veto | BatchNormalize | ESSMixing, Field(discriminator="kind")
]
Weighting = TIS | MIS | IcePop
Rejection = Reject | Veto
Rescaling = BatchNormalize | ESSMixing


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse a list that says two things about weights, or rescales what is not there yet.

    Raises:
        ValueError: two weightings, the same criterion twice, a rescaling before any weighting, or
            a weighting or rejection after a rescaling.
    """
    weighting: str | None = None
    rescaling: str | None = None
    criteria: set[str] = set()
    for stage in stages:
        if isinstance(stage, Rescaling):
            rescaling = stage.kind
        elif rescaling is not None:
            raise ValueError(
                f"stages: {rescaling} rescales the weights of a finished batch; put {stage.kind} "
                "before it"
            )
        if isinstance(stage, Rejection):
            if stage.name in criteria:
                raise ValueError(f"stages: {stage.name} stands twice; keep the narrower bounds")
            criteria.add(stage.name)
        if isinstance(stage, Weighting):
            if weighting is not None:
                raise ValueError(
                    f"stages: {weighting} and {stage.kind} both give weights; keep one of them"
                )
            weighting = stage.kind
        if isinstance(stage, ESSMixing) and weighting == "icepop":
            raise ValueError(
                "stages: ess_mixing would give back a weight to what icepop set to 0; use mis"
            )
        if isinstance(stage, Rescaling) and weighting is None:
            raise ValueError(
                f"stages: {stage.kind} rescales weights, but no tis, mis or icepop stands before it"
            )
