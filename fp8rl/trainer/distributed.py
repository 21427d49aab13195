"""The trainer's process group: one process alone, or the ranks that were started together.

One process needs no port and no rendezvous: its store lies in memory. Several find each other as
``launch.py`` or torchrun says (torch's own environment variables). Backend Gloo.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from fp8rl.config.run import RunConfig
from fp8rl.errors import TrainerError
from fp8rl.lifeline import ends_at_once
from fp8rl.trainer.megatron_cpu import use_still_rng_tracker

TIMEOUT = timedelta(minutes=10)  # how long a collective waits for a rank that is late
ADVICE = (  # that Megatron's sequence parallelism gives or gets in every run
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # of each expert
    "When using sequence parallelism it is recommended to set the environment variable CUDA",
    r"`torch\.distributed\.\w+_tensor` is deprecated",
)


@contextmanager
def init_distributed(config: RunConfig) -> Iterator[int]:
    """Set up Gloo and Megatron's parallel state for ``config.trainer``; yield this rank's number.

    Torn down at the end of the block.

    Raises:
        TrainerError: the number of ranks started is not tensor x pipeline parallel; or, from the
            block, another rank has gone.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.world_size:
        raise TrainerError(
            f"trainer.tensor_parallel x trainer.pipeline_parallel is {config.world_size}, but "
            f"{started} rank(s) were started; use torchrun --nproc-per-node {config.world_size}"
        )
    with ends_at_once(), warnings.catch_warnings():
        # each import says once more that Apex and Transformer Engine are not installed
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core import parallel_state
        from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401
        from megatron.core.optimizer import clip_grads  # noqa: F401

    if started == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.trainer.tensor_parallel,
            pipeline_model_parallel_size=config.trainer.pipeline_parallel,
            expert_model_parallel_size=config.trainer.expert_parallel,
            expert_tensor_parallel_size=(
                config.trainer.tensor_parallel // config.trainer.expert_parallel
            ),
        )
        use_still_rng_tracker()
        with warnings.catch_warnings():
            for advice in ADVICE:
                warnings.filterwarnings("ignore", advice)
            yield dist.get_rank()
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise TrainerError(
            f"trainer rank {dist.get_rank()} lost another rank: it ended, and its own message says "
            f"why, or it was silent for {TIMEOUT}"
        ) from error
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
