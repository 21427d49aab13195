"""The policy's shape in a run's configuration, and the base of all its sections."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic import model_validator as check

ModelFamily = Literal["qwen3", "qwen2", "qwen3_moe"]
BLOCK = 128  # the width of an FP8 weight block; every linear's sides are multiples of it
VOCAB_MULTIPLE = 64  # the vocabulary is padded to a multiple of this


class Frozen(BaseModel):
    """Base of all sections: immutable; unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class ModelConfig(Frozen):
    """The policy: a Qwen-shaped decoder (RMSNorm, RoPE, GQA, SwiGLU, untied head)."""

    family: ModelFamily = Field(
        "qwen3",
        description="qwen3: norms on q and k; qwen2: biases on q, k and v instead; qwen3_moe: "
        "qwen3 whose every layer has experts in place of its MLP",
    )
    num_layers: PositiveInt = Field(4, description="decoder layers")
    hidden_size: PositiveInt = Field(256, description="width; a multiple of 128")
    ffn_hidden_size: PositiveInt = Field(
        512, description="SwiGLU width; a multiple of 128; without meaning for qwen3_moe"
    )
    num_experts: PositiveInt | None = Field(None, description="experts in a layer (qwen3_moe)")
    experts_per_token: PositiveInt | None = Field(
        None, description="experts that a token goes to, by softmax and top-k (qwen3_moe)"
    )
    moe_ffn_hidden_size: PositiveInt | None = Field(
        None, description="SwiGLU width of an expert; a multiple of 128 (qwen3_moe)"
    )
    num_heads: PositiveInt = Field(4, description="query heads")
    num_kv_heads: PositiveInt = Field(2, description="key/value heads (GQA)")
    head_dim: PositiveInt = Field(64, description="width of a head; a multiple of 32")
    rope_theta: PositiveFloat = Field(10_000.0, description="RoPE base")
    norm_eps: PositiveFloat = Field(1e-6, description="epsilon of every RMSNorm")
    init_std: PositiveFloat = Field(0.02, description="std of the initial weights")

    @check(mode="after")
    def _blocks_fit(self) -> Self:
        widths = {
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_heads x head_dim": self.num_heads * self.head_dim,
            "num_kv_heads x head_dim": self.num_kv_heads * self.head_dim,
        }
        if self.moe_ffn_hidden_size is not None:
            widths["moe_ffn_hidden_size"] = self.moe_ffn_hidden_size
        for name, width in widths.items():
            if width % BLOCK:
                near = max(BLOCK, round(width / BLOCK) * BLOCK)
                raise ValueError(
                    f"{name} is {width}, not a multiple of {BLOCK} (the FP8 block); use {near}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, not a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 32:
            raise ValueError(f"head_dim is {self.head_dim}, not a multiple of 32")
        return self

    @check(mode="after")
    def _heads_fit_the_family(self) -> Self:
        """Qwen2's config.json has no head_dim: vLLM passes over one, transformers would obey it."""
        width = self.num_heads * self.head_dim
        if self.family == "qwen2" and width != self.hidden_size:
            raise ValueError(
                f"num_heads x head_dim is {width}, which for family qwen2 must be hidden_size "
                f"({self.hidden_size}); change one of the three, or use family=qwen3"
            )
        return self

    @check(mode="after")
    def _experts_fit_the_family(self) -> Self:
        keys = {
            "num_experts": self.num_experts,
            "experts_per_token": self.experts_per_token,
            "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
        }
        given = [key for key, value in keys.items() if value is not None]
        if self.family != "qwen3_moe" and given:
            raise ValueError(
                f"{', '.join(given)} given, but family {self.family} has no experts; leave them "
                "out, or use family=qwen3_moe"
            )
        if self.family == "qwen3_moe" and len(given) < len(keys):
            missing = [key for key in keys if key not in given]
            raise ValueError(f"family qwen3_moe needs {', '.join(missing)}")
        experts, chosen = self.num_experts, self.experts_per_token
        if experts is not None and chosen is not None and chosen > experts:
            raise ValueError(f"experts_per_token is {chosen}, more than num_experts ({experts})")
        return self

    @property
    def is_moe(self) -> bool:
        """Whether the layers have experts."""
        return self.family == "qwen3_moe"
