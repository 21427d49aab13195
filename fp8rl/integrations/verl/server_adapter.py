"""veRL's way to its vLLM servers, with weights that are quantized before they are sent.

    trainer and engine on the same GPUs   every trainer rank quantizes what veRL's generator gives
                                          it, and brings it to the worker beside it
    apart                                 rank 0 quantized; our checkpoint engine brings the
                                          messages, and they pass

With another `checkpoint_engine.backend` this is veRL's adapter and nothing else.
"""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter as VeRLServerAdapter

from fp8rl.integrations.verl.settings import BACKEND, SyncSettings, WeightSyncError, check_rollout
from fp8rl.integrations.verl.wire import Sender

MESSAGES = "fp8rl"  # the wire format of our checkpoint engine


class ServerAdapter(VeRLServerAdapter):
    """The client of one vLLM server, on one rank."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Raises WeightSyncError where the server is configured so that it cannot take updates."""
        super().__init__(config, *args, **kwargs)
        self._sender: Sender | None = None
        self._ours = self.config.checkpoint_engine.backend == BACKEND
        if self._ours:
            check_rollout(self.config)

    async def update_weights(
        self,
        weights: Any,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Bring a version to the engine; as veRL's, which raises what the workers found wrong.

        Raises:
            WeightSyncError: LoRA adapters come. On this side also all that `Sender` raises.
        """
        if not self._ours:
            await super().update_weights(
                weights, global_steps=global_steps, wire_format=wire_format, **kwargs
            )
            return
        if kwargs.get("peft_config") is not None:
            raise WeightSyncError(
                "LoRA adapters cannot be published in FP8; set actor_rollout_ref.model.lora.merge"
            )
        messages = weights if wire_format == MESSAGES else self._quantized(weights, global_steps)
        await super().update_weights(messages, global_steps=global_steps)

    def _quantized(self, weights: Any, global_steps: int | None) -> Any:
        if self._sender is None:
            kwargs = self.config.checkpoint_engine.engine_kwargs.get(BACKEND) or {}
            self._sender = Sender(SyncSettings.model_validate(dict(kwargs)))
        return self._sender.stages(weights, global_steps)
