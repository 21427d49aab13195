"""The rollout engine and its KV-cache scales in a run's configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import model_validator as check

from fp8rl.config.model import Frozen
from fp8rl.errors import ConfigError
from fp8rl.quant import RouterPrecision
from fp8rl.quant.kv_rule import KVScaleRule
from fp8rl.quant.scales import ScaleFormat

Precision = Literal["bf16", "fp8", "kv-only", "fp8-kv"]
Activations = Literal["bf16", "fp8"]
BF16_WEIGHTS: frozenset[Precision] = frozenset({"bf16", "kv-only"})
FP8_CACHE: frozenset[Precision] = frozenset({"kv-only", "fp8-kv"})


class RolloutConfig(Frozen):
    """The vLLM engine and what is asked of it each step."""

    precision: Precision = Field(
        "fp8-kv",
        description="what is FP8: bf16 nothing; fp8 weights; kv-only KV cache; fp8-kv both",
    )
    activations: Activations | None = Field(
        None,
        description="input of FP8 linears: fp8 (W8A8, as on a GPU) or bf16 (W8A16); null is what "
        "vLLM does: bf16 on a CPU, always fp8 on CUDA",
    )
    scale_format: ScaleFormat = Field(
        "pow2", description="scales of FP8 weights: powers of two, or any fp32 number"
    )
    router: RouterPrecision = Field(
        "bf16",
        description="weights of routers in the engine: bf16, or fp8-rounded: through blockwise FP8 "
        "and back, as in a stack that quantizes them (qwen3_moe)",
    )
    prompts_per_step: PositiveInt = Field(64, description="prompts a step")
    samples_per_prompt: int = Field(8, ge=2, description="size of a GRPO group")
    segment_tokens: PositiveInt | None = Field(
        None,
        description="tokens of a response made at once; one that has not ended goes on under later "
        "weights; null, or as many as the longest response has: all of them",
    )
    temperature: PositiveFloat = Field(1.0, description="of sampling and of scoring")
    kv_cache_gib: PositiveFloat = Field(0.25, description="host memory for the KV cache, GiB")

    @check(mode="after")
    def _fits_the_weights(self) -> Self:
        refuse_unfit_rollout(self.precision, self.activations, self.scale_format)
        return self


class KVScaleConfig(KVScaleRule):
    """How the KV-cache scales are measured, and when; the rule itself is in ``kv_rule.py``."""

    recalibrate: Literal["every-step", "once", "never"] = Field(
        "every-step",
        description="every-step: measured on each version; to see what that is worth, once: on "
        "version 0 alone; never: nothing is measured, every scale is 1.0",
    )
    measured_by: Literal["trainer", "engine"] = Field(
        "trainer", description="whose forward is watched: its own, or one of the live engine"
    )
    calibrate_on: Literal["trained", "prompts", "fixed"] = Field(
        "trained", description="the batch just trained, the next prompts, or fixed demonstrations"
    )
    calibration_tokens: PositiveInt = Field(512, description="bound on tokens observed a step")
    warn_saturation: float = Field(
        1e-3, ge=0, le=1, description="share of clipped elements above which a step warns"
    )


def refuse_unfit_rollout(
    precision: Precision, activations: Activations | None, scale_format: ScaleFormat
) -> None:
    """Raise ConfigError where something is asked of FP8 weights, and the weights are BF16."""
    if precision in BF16_WEIGHTS and (activations == "fp8" or scale_format == "fp32"):
        asked = "activations=fp8" if activations == "fp8" else "scale_format=fp32"
        raise ConfigError(
            f"rollout.{asked} is for FP8 weights, and those of rollout.precision={precision} are "
            "BF16: leave it out, or use rollout.precision=fp8 or fp8-kv"
        )
