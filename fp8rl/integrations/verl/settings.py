"""The settings of FP8 weight sync, in veRL's own keys:

    actor_rollout_ref.rollout.checkpoint_engine.backend=fp8rl
    actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.fp8rl.model_path=...
    actor_rollout_ref.rollout.quantization=fp8
    actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=EXTENSION

What is quantized is what veRL's `quantization=fp8` has vLLM expect: every linear of the decoder
layers but the router. An engine that expects anything else refuses the first update by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat

from fp8rl.quant import FP32Source, QuantPlan
from fp8rl.sync.transport import STAGE_BYTES

BACKEND: Final = "fp8rl"
EXTENSION: Final = "fp8rl.integrations.verl.worker_extension.WorkerExtension"
ROLLOUT: Final = "actor_rollout_ref.rollout"


class WeightSyncError(ValueError):
    """The configuration asks for what FP8 weight sync in veRL cannot do; names the key."""


class SyncSettings(BaseModel):
    """`checkpoint_engine.engine_kwargs.fp8rl`.

    model_path: the model's folder or name on the hub, of which only config.json is read; as
        `actor_rollout_ref.model.path`.
    kv_cache_dtype: as `engine_kwargs.vllm.kv_cache_dtype`; with fp8 every version needs KV scales,
        see `wire.use_kv_scales`.
    fp32_as: what fp32 weights of the trainer stand for, as in `quantize_blockwise`; "export" rounds
        them to BF16 first, which is what a mixed-precision forward computes with.
    transport: between trainer and rollout workers; by default NCCL where there is CUDA.
    timeout_seconds: for meeting, and for each piece of an update.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_path: str
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    fp32_as: FP32Source = "export"
    transport: Literal["gloo", "nccl"] | None = None
    timeout_seconds: PositiveFloat = 600.0

    @property
    def kv_layers(self) -> int:
        """Attention layers for which scales are sent."""
        return int(self.hf_config()["num_hidden_layers"]) if self.kv_cache_dtype == "fp8" else 0

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json."""
        from transformers import PretrainedConfig

        found: dict[str, Any] = PretrainedConfig.get_config_dict(self.model_path)[0]
        return found

    def plan(self) -> QuantPlan:
        """Which tensors are sent in FP8."""
        return QuantPlan.from_hf_config(self.hf_config())


def check_bucket(nbytes: int) -> None:
    """Refuse buckets of veRL in which a stage of ours has no room; raises WeightSyncError."""
    if nbytes < STAGE_BYTES:
        raise WeightSyncError(
            f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes is {nbytes >> 20}, and "
            f"checkpoint_engine.backend={BACKEND} needs {STAGE_BYTES >> 20} or more"
        )


def check_rollout(rollout: Any) -> None:
    """Refuse a rollout config with which the engine could not take our updates.

    Args:
        rollout: veRL's RolloutConfig with `checkpoint_engine.backend=fp8rl`.

    Raises:
        WeightSyncError: names the key, what it holds, and what it must.
    """
    vllm: Mapping[str, Any] = (rollout.engine_kwargs or {}).get("vllm") or {}
    wanted = {
        "name": (rollout.name, "vllm"),
        "quantization": (rollout.quantization, "fp8"),
        "engine_kwargs.vllm.worker_extension_cls": (vllm.get("worker_extension_cls"), EXTENSION),
    }
    for key, (found, expected) in wanted.items():
        if found != expected:
            raise WeightSyncError(
                f"checkpoint_engine.backend={BACKEND} needs {ROLLOUT}.{key}={expected}, "
                f"found {found}"
            )
    check_bucket(int(rollout.checkpoint_engine.update_weights_bucket_megabytes) << 20)
