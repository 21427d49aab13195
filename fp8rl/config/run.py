"""The configuration of one RL run: frozen, typed, and refused before anything heavy starts.

Variants (such as the correction) are unions tagged by ``kind``. There are no environment variables.
The model's section is in ``model.py``, the engine's in ``rollout.py``, the drift watch's in
``drift.py``; files and overrides are read by ``file.py``. What the machine must offer is checked in
``doctor/machine.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import model_validator as check

from fp8rl.config.drift import DriftConfig
from fp8rl.config.model import BLOCK, VOCAB_MULTIPLE, Frozen, ModelConfig
from fp8rl.config.rollout import BF16_WEIGHTS, FP8_CACHE, KVScaleConfig, RolloutConfig
from fp8rl.correction import CorrectionConfig, LossConfig, PPOClip, check_bypass
from fp8rl.drift.answer import can_fall_back, can_tighten

TrainerPrecision = Literal["bf16", "fp8-aligned"]


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
    key_outliers: PositiveFloat | None = Field(
        None,
        description="size of outlier channels planted in the K biases afterwards, as Qwen2.5 has "
        "them: BF16 does not see them, an FP8 KV cache does; to test numerics (qwen2)",
    )
    start_from: Path | None = Field(
        None, description="folder with the end of this very warm-up, to begin there instead"
    )


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
    expert_parallel: PositiveInt = Field(
        1,
        description="into how many parts the tensor-parallel ranks divide the experts (qwen3_moe); "
        "a divisor of tensor_parallel; what is left of it cuts each expert",
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
    drift: DriftConfig = DriftConfig()

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
        self._check_experts(tp, self.trainer.expert_parallel)
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

    def _check_experts(self, tp: int, ep: int) -> None:
        shape = self.model
        if self.rollout.router != "bf16" and not shape.is_moe:
            raise ValueError(
                f"rollout.router is {self.rollout.router}, but model.family {shape.family} has no "
                "router; leave it out, or use model.family=qwen3_moe"
            )
        if ep > 1 and not shape.is_moe:
            raise ValueError(
                f"trainer.expert_parallel is {ep}, but model.family {shape.family} has no experts; "
                "use trainer.expert_parallel=1 or model.family=qwen3_moe"
            )
        if tp % ep:
            raise ValueError(
                f"trainer.expert_parallel is {ep}, which does not divide trainer.tensor_parallel "
                f"({tp}), whose ranks divide the experts; use {tp}"
            )
        if shape.num_experts is None or shape.moe_ffn_hidden_size is None:
            return
        if shape.num_experts % ep:
            raise ValueError(
                f"trainer.expert_parallel is {ep}, which does not divide model.num_experts "
                f"({shape.num_experts})"
            )
        if shape.moe_ffn_hidden_size % (tp // ep):
            raise ValueError(
                f"{tp // ep} ranks (trainer.tensor_parallel / trainer.expert_parallel) cut each "
                f"expert, which does not divide moe_ffn_hidden_size ({shape.moe_ffn_hidden_size})"
            )

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
            "num_heads x head_dim": (shape.num_heads * shape.head_dim, ranks),
            "num_kv_heads x head_dim": (shape.num_kv_heads * shape.head_dim, ranks),
            "ffn_hidden_size": (shape.ffn_hidden_size, ranks),
        }
        if shape.moe_ffn_hidden_size is not None:  # in place of the MLP
            per_expert = ranks // self.trainer.expert_parallel
            del cut["ffn_hidden_size"]
            cut["moe_ffn_hidden_size"] = (shape.moe_ffn_hidden_size, per_expert)
        aligned, fp8 = self.trainer.precision == "fp8-aligned", self.drift.every is not None
        fp8 = fp8 and self.rollout.precision not in BF16_WEIGHTS
        why = "trainer.precision is fp8-aligned" if aligned else "drift.every is set"
        for name, (width, parts) in cut.items():
            if (aligned or fp8) and width % (BLOCK * parts):
                raise ValueError(
                    f"{why} and trainer.tensor_parallel is {ranks}, so "
                    f"{name} must be a multiple of {BLOCK * parts}, for no FP8 block to straddle "
                    f"ranks; it is {width}"
                )
        return self

    @check(mode="after")
    def _outliers_have_a_place(self) -> Self:
        if self.warmup.key_outliers is not None and (
            self.model.family != "qwen2" or self.world_size > 1
        ):
            raise ValueError(
                f"warmup.key_outliers is {self.warmup.key_outliers:g}, which needs the K biases of "
                f"model.family=qwen2 on one trainer rank; found {self.model.family} on "
                f"{self.world_size}"
            )
        return self

    @check(mode="after")
    def _drift_can_be_answered(self) -> Self:
        answer, scales = self.drift.answer, self.kv_scales.recalibrate
        if answer != "none" and self.drift.every is None:
            raise ValueError(f"drift.answer is {answer}, but no probe is due; set drift.every")
        if answer == "recalibrate" and (
            self.rollout.precision not in FP8_CACHE or scales == "never"
        ):
            raise ValueError(
                "drift.answer is recalibrate, but there are no KV scales to measure: "
                f"rollout.precision is {self.rollout.precision} and kv_scales.recalibrate {scales}"
            )
        if answer == "tighten" and not can_tighten(self.correction):
            raise ValueError(
                "drift.answer is tighten, but correction.stages have no bound on a ratio to "
                "tighten; add one, as {kind: tis, cap: 2.0}"
            )
        if answer == "fall-back":
            self._check_fall_back()
        return self

    def _check_fall_back(self) -> None:
        if not can_fall_back(self.rollout):
            raise ValueError(
                f"drift.answer is fall-back, but rollout.precision is {self.rollout.precision}: "
                "nothing is FP8 that could become BF16; use drift.answer=none or tighten"
            )
        if self.trainer.precision == "fp8-aligned":
            raise ValueError(
                "drift.answer is fall-back, but trainer.precision is fp8-aligned: the trainer "
                "computes with the FP8 weights that the engine would no longer have; use "
                "trainer.precision=bf16, or another drift.answer"
            )

    @property
    def world_size(self) -> int:
        """Trainer ranks: tensor x pipeline parallel."""
        return self.trainer.tensor_parallel * self.trainer.pipeline_parallel
