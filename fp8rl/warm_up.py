"""The supervised steps before RL, and their end as a start that several runs share.

    warm_up     AdamW on demonstrations of the task, some digits of which are wrong; outliers in K
                are planted where they are asked for
    make_start  a warm-up alone, without an engine, whose end is a checkpoint
    load_start  a run that begins there (``warmup.start_from``)

Runs with one seed and one model, task and warm-up may start from the very same weights, whatever
they differ in: then their difference is that of what they differ in. The start says what it was
made with, and a run that would have warmed up otherwise is refused.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fp8rl import checkpoint
from fp8rl.batch import TokenBatch
from fp8rl.config.run import RunConfig
from fp8rl.errors import CheckpointError
from fp8rl.key_outliers import plant
from fp8rl.progress import Progress
from fp8rl.rollout_batch import examples_batch
from fp8rl.task import DigitTask
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer


def warm_up(
    config: RunConfig, trainer: MegatronTrainer, task: DigitTask, progress: Progress
) -> None:
    """Supervised steps to a start where reward is low but not zero."""
    settings = config.warmup
    began, loss = time.perf_counter(), float("nan")
    for number in range(settings.steps):
        batch = demonstrations(config, task, number)
        tokens = batch.response_mask.sum()

        def loss_fn(logprobs: Tensor, rows: slice, tokens: Tensor = tokens) -> Tensor:
            return -logprobs.sum() / tokens  # 0 outside the responses

        with progress.phase(f"warm-up {number + 1}/{settings.steps}", timed=False):
            loss = trainer.update(batch, loss_fn, learning_rate=settings.learning_rate)["loss"]
    if settings.key_outliers is not None:
        plant(trainer, config.model, settings.key_outliers)
    trainer.restart_optimizer()
    progress.message(
        f"warm-up: {settings.steps} supervised steps of {settings.batch_size} examples, "
        f"loss {loss:.3f}, {time.perf_counter() - began:.0f} s"
    )


def demonstrations(config: RunConfig, task: DigitTask, number: int) -> TokenBatch:
    """The examples of warm-up step ``number``."""
    shown = task.demonstrations(number, config.warmup.batch_size, config.warmup.slip_rate)
    return examples_batch(task, shown)


def start_facts(config: RunConfig) -> dict[str, Any]:
    """What a start is made of, as JSON: the seed, the model, the task and the warm-up."""
    plain = config.model_dump(mode="json", include={"seed", "model", "task", "warmup"})
    del plain["warmup"]["start_from"]
    return plain


def make_start(config: RunConfig, folder: Path) -> None:
    """Warm up as ``config`` says, on every rank, and keep the end of it in ``folder``.

    In BF16, whatever the run's trainer computes with: its state is the same to all of them. A start
    that is there already is kept: it is whole, or it is not there.
    """
    if checkpoint.latest(folder) is not None:
        return
    task = DigitTask(config.task, config.seed)
    plain = config.trainer.model_copy(update={"precision": "bf16"})
    with init_distributed(config) as rank:
        trainer = MegatronTrainer(config.model_copy(update={"trainer": plain}), task.vocab_size)
        progress = Progress(config.warmup.steps, "warm-up", Console(), enabled=rank == 0)
        with progress:
            warm_up(config, trainer, task, progress)
        checkpoint.save(
            folder,
            0,
            trainer.state(),
            rank=rank,
            world_size=config.world_size,
            extra=start_facts(config),
            barrier=dist.barrier,
        )


def load_start(folder: Path, config: RunConfig, trainer: MegatronTrainer) -> None:
    """Begin where the warm-up in ``folder`` ended.

    Raises:
        CheckpointError: no start is there, it is broken, or was made with another seed, model, task
            or warm-up than the run's; each is named.
    """
    found = checkpoint.latest(folder)
    if found is None:
        raise CheckpointError(
            f"{folder}: holds no start (warmup.start_from); `fp8rl stability` makes them, or leave "
            "it out to warm up"
        )
    saved = checkpoint.load(found, rank=dist.get_rank(), world_size=config.world_size)
    wanted = start_facts(config)
    odd = [
        f"{name} is {saved.extra.get(name)}, the run's {value}"
        for name, value in wanted.items()
        if saved.extra.get(name) != value
    ]
    if odd:
        raise CheckpointError(f"{found}: is the start of another run: {'; '.join(odd)}")
    trainer.load_state(saved.tensors)
