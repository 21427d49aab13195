"""veRL's vLLM worker extension with updates that are proven.

It is `actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls`; see `settings.EXTENSION`.

Everything but updates is veRL's. Its patches of vLLM's FP8 layers are left out: they change how
weights are laid out after a load, and are for weights that are quantized where they arrive.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.device import get_device_name
from verl.utils.vllm.vllm_quant_utils import fp8_state
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import (
    monkey_patch_compute_logits,
    set_death_signal,
    vLLMColocateWorkerExtension,
)

from fp8rl.integrations.verl.proven_updates import ProvenUpdates
from fp8rl.integrations.verl.settings import WeightSyncError


class WorkerExtension(ProvenUpdates, vLLMColocateWorkerExtension):
    """Mixed into vLLM's worker class by vLLM."""

    device: Any
    local_rank: int

    def __new__(cls, **_: Any) -> WorkerExtension:
        """Make a worker without veRL's patches; refused where they are in force already."""
        set_death_signal()
        if fp8_state.vllm_patches:
            raise WeightSyncError(
                "veRL has patched vLLM's FP8 layers in this process, whose layout fp8rl then "
                "cannot prove; the engine must start its workers as new processes "
                "(VLLM_WORKER_MULTIPROCESSING_METHOD=spawn)"
            )
        worker = object.__new__(cls)
        worker._is_qat_model = worker._is_modelopt_qat = False
        return worker

    def monkey_patch_model(
        self, vocab_size: int, banned_token_ids: list[int] | None = None
    ) -> None:
        """Keep tokens out that must not be sampled; the weights' loaders stay vLLM's.

        veRL calls this when the engine has started, so what cannot be proven is refused here.
        """
        self.fp8rl_updates()
        for model in self._iter_all_models():
            monkey_patch_compute_logits(model, vocab_size, banned_token_ids)

    def update_weights_from_ipc(
        self,
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = False,
        use_shm: bool = False,
    ) -> None:
        """Take the update that veRL's sender brings; raises as `Updates.finish`.

        The server adapter refuses LoRA adapters, so there is no `peft_config`.
        """
        if self.device is None:
            self.device = torch.device(f"{get_device_name()}:{self.local_rank}")
        receiver = BucketedWeightReceiver(
            zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm
        )
        updates = self.fp8rl_updates()
        updates.begin()
        receiver.receive_weights(lambda bucket, _: updates.take(bucket))
        updates.finish()
