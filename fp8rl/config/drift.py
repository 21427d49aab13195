"""The drift watch in a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from fp8rl.config.model import Frozen


class DriftConfig(Frozen):
    """How often engine and trainer are compared layer by layer, and when that warns."""

    every: PositiveInt | None = Field(
        None, description="steps between probes; null: none; 10 costs the demo 2 % of its time"
    )
    probe_tokens: PositiveInt = Field(
        512, description="bound on tokens of the rollout batch that a probe takes; one at least"
    )
    warn_unexplained: float = Field(
        0.1,
        gt=0,
        description="warn where this share of what a layer adds (or of the embedding) differs, "
        "and no rounding explains it",
    )
    warn_rounding: float = Field(
        0.2,
        gt=0,
        description="warn where rounding weights, activations or KV cache changes this share of "
        "what a layer adds",
    )
    warn_misrouted: float = Field(
        0.05, gt=0, le=1, description="warn where routers choose otherwise, given the same stream"
    )
    warn_logprob: float = Field(
        0.2, gt=0, description="warn where log-probs differ by this in the mean, nats"
    )
    answer: Literal["none", "recalibrate", "tighten", "fall-back"] = Field(
        "none",
        description="to a warning. Until a probe finds nothing: recalibrate: where the KV cache is "
        "to blame, its scales are measured anew, on 4 times the tokens; tighten: the correction's "
        "bounds on the ratio go to their square roots. For good: fall-back: a new engine, with the "
        "KV cache or the weights in BF16, whichever is to blame",
    )
