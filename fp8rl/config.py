"""The configuration of one RL run: frozen, typed, and refused before anything heavy starts.

A run is described by a YAML file plus ``a.b=c`` overrides. Unknown keys are refused with the
nearest known one; variants (such as the correction) are unions tagged by ``kind``. There are no
environment variables. What the machine must offer is checked in ``doctor.py``, not here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic import model_validator as check

from fp8rl.correction import CorrectionConfig, LossConfig, PPOClip, check_bypass
from fp8rl.errors import ConfigError
from fp8rl.quant.kv_rule import KVScaleRule

Precision = Literal["bf16", "fp8", "kv-only", "fp8-kv"]
BF16_WEIGHTS: frozenset[Precision] = frozenset({"bf16", "kv-only"})
FP8_CACHE: frozenset[Precision] = frozenset({"kv-only", "fp8-kv"})
TrainerPrecision = Literal["bf16", "fp8-aligned"]
ModelFamily = Literal["qwen3", "qwen2"]
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
        "qwen3", description="qwen3: norms on q and k; qwen2: biases on q, k and v instead"
    )
    num_layers: PositiveInt = Field(4, description="decoder layers")
    hidden_size: PositiveInt = Field(256, description="width; a multiple of 128")
    ffn_hidden_size: PositiveInt = Field(512, description="SwiGLU width; a multiple of 128")
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


class TaskConfig(Frozen):
    """The verifiable task: operations on short digit strings, checked by a rule."""

    operations: tuple[Literal["reverse", "sort", "sum"], ...] = Field(
        ("reverse", "sort"), min_length=1, description="what the model is asked to do"
    )
    min_digits: PositiveInt = Field(3, description="shortest operand")
    max_digits: PositiveInt = Field(5, description="longest operand")
    heldout_prompts: PositiveInt = Field(512, description="prompts never trained on")

    @check(mode="after")
    def _lengths(self) -> Self:
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits {self.min_digits} > max_digits {self.max_digits}")
        return self


class WarmupConfig(Frozen):
    """Supervised steps before RL, to a start where reward is low but not zero."""

    steps: int = Field(200, ge=0, description="supervised steps")
    batch_size: PositiveInt = Field(128, description="demonstrations a step")
    learning_rate: PositiveFloat = Field(1e-3, description="AdamW learning rate")
    slip_rate: float = Field(0.33, ge=0, le=1, description="how often a digit in them is wrong")


class TrainerConfig(Frozen):
    """AdamW on fp32 masters of BF16 weights, and how the model is split over ranks."""

    precision: TrainerPrecision = Field(
        "bf16", description="of its linears; fp8-aligned: with the weights that the engine holds"
    )
    learning_rate: PositiveFloat = Field(1e-4, description="AdamW learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    grad_clip: PositiveFloat = Field(1.0, description="bound on the gradient norm")
    normalize_advantages: bool = Field(
        True, description="divide advantages by their group's std (false: Dr.GRPO)"
    )
    minibatches: PositiveInt = Field(2, description="optimizer steps taken on one rollout batch")
    micro_batch_size: PositiveInt = Field(128, description="sequences in one forward pass")
    tensor_parallel: PositiveInt = Field(1, description="tensor-parallel ranks")
    pipeline_parallel: PositiveInt = Field(1, description="pipeline stages")


class RolloutConfig(Frozen):
    """The vLLM engine and what is asked of it each step."""

    precision: Precision = Field(
        "fp8-kv",
        description="what is FP8: bf16 nothing; fp8 weights; kv-only KV cache; fp8-kv both",
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


class KVScaleConfig(KVScaleRule):
    """How the KV-cache scales are measured each step; the rule itself is in ``kv_rule.py``."""

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


class RunConfig(Frozen):
    """One RL run, whole."""

    seed: int = Field(0, ge=0, description="of weights, prompts and sampling")
    steps: PositiveInt = Field(100, description="RL steps")
    eval_every: PositiveInt = Field(10, description="steps between held-out evaluations")
    checkpoint_every: PositiveInt = Field(5, description="steps between checkpoints")
    run_dir: Path = Field(Path("runs/demo"), description="folder that the run writes")
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    warmup: WarmupConfig = WarmupConfig()
    trainer: TrainerConfig = TrainerConfig()
    rollout: RolloutConfig = RolloutConfig()
    kv_scales: KVScaleConfig = KVScaleConfig()
    correction: CorrectionConfig = CorrectionConfig()
    loss: LossConfig = PPOClip()

    @check(mode="after")
    def _corrects_once(self) -> Self:
        check_bypass(self.correction, self.loss)
        return self

    @check(mode="after")
    def _parallelism_fits(self) -> Self:
        tp, pp = self.trainer.tensor_parallel, self.trainer.pipeline_parallel
        if self.model.num_kv_heads % tp or self.model.num_heads % tp:
            raise ValueError(
                f"trainer.tensor_parallel is {tp}, which does not divide num_heads "
                f"({self.model.num_heads}) and num_kv_heads ({self.model.num_kv_heads})"
            )
        if self.model.ffn_hidden_size % tp or VOCAB_MULTIPLE % tp:
            raise ValueError(
                f"trainer.tensor_parallel is {tp}, which does not divide ffn_hidden_size "
                f"({self.model.ffn_hidden_size}) and the vocabulary (a multiple of "
                f"{VOCAB_MULTIPLE})"
            )
        if self.model.num_layers % pp:
            raise ValueError(
                f"trainer.pipeline_parallel is {pp}, which does not divide num_layers "
                f"({self.model.num_layers})"
            )
        if self.rollout.prompts_per_step % self.trainer.minibatches:
            raise ValueError(
                f"trainer.minibatches is {self.trainer.minibatches}, which does not divide "
                f"rollout.prompts_per_step ({self.rollout.prompts_per_step})"
            )
        return self

    @check(mode="after")
    def _precisions_fit(self) -> Self:
        if self.trainer.precision == "fp8-aligned" and self.rollout.precision in BF16_WEIGHTS:
            raise ValueError(
                f"trainer.precision is fp8-aligned, but rollout.precision is "
                f"{self.rollout.precision}: the engine has no FP8 weights to align with; use "
                "trainer.precision=bf16 or rollout.precision=fp8"
            )
        shape, ranks = self.model, self.trainer.tensor_parallel
        cut = {
            "num_heads x head_dim": shape.num_heads * shape.head_dim,
            "num_kv_heads x head_dim": shape.num_kv_heads * shape.head_dim,
            "ffn_hidden_size": shape.ffn_hidden_size,
        }
        for name, width in cut.items():
            if self.trainer.precision == "fp8-aligned" and width % (BLOCK * ranks):
                raise ValueError(
                    f"trainer.precision is fp8-aligned and trainer.tensor_parallel is {ranks}, so "
                    f"{name} must be a multiple of {BLOCK * ranks}, for no FP8 block to straddle "
                    f"ranks; it is {width}"
                )
        return self

    @property
    def world_size(self) -> int:
        """Trainer ranks: tensor x pipeline parallel."""
        return self.trainer.tensor_parallel * self.trainer.pipeline_parallel


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of range. The message
            names each key, what was found and what would do.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected keys and values")
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, origin=str(path))


def parse_config(raw: dict[str, Any], *, origin: str = "config") -> RunConfig:
    """Validate a nested dict; raises ConfigError (see ``load_config``)."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=c")
    *sections, leaf = key.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:  # absent, or a section left empty in the file
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _explain(item: dict[str, Any]) -> str:
    """One of pydantic's complaints as one sentence."""
    where, known, kinds = _locate(item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where.rpartition(".")[2], known, n=1, cutoff=0.0)
        return f"unknown key {where!r}; did you mean {near[0]!r}?"
    if item["type"] == "union_tag_not_found":
        return f"{where}: has no kind; set {where}.kind to one of {', '.join(kinds)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    found = item["input"]
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r})"
    return f"{where or 'config'}: {message}{shown}"


def _locate(location: Sequence[str | int]) -> tuple[str, list[str], list[str]]:
    """The dotted key that a location means, the keys known where it stands, the kinds it may have.

    Inside a tagged union pydantic adds the tag to the location; a tag is no key and is left out.
    """
    model: type[BaseModel] = RunConfig
    variants: dict[str | int, type[BaseModel]] = {}
    path: list[str] = []
    known: list[str] = []
    for part in location:
        if part in variants:
            model, variants = variants[part], {}
            continue
        path.append(str(part))
        if isinstance(part, int):  # an item of a list, of the same kinds
            continue
        known = list(model.model_fields)
        field = model.model_fields.get(str(part))
        kinds = _models_in(field.annotation) if field else []
        if len(kinds) == 1:
            model = kinds[0]
        variants = {kind.model_fields["kind"].default: kind for kind in kinds if len(kinds) > 1}
    return ".".join(path), known, [str(kind) for kind in variants]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may hold: itself, a union's members, a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for member in get_args(annotation) for kind in _models_in(member)]
