"""What samples for a run, in one precision: the engine, and all that goes with it.

Engine, quantization plan, publisher, KV scales and drift watch belong together. They are made
together, in the order in which others are ready for them,

    engine       at once; it comes up while the trainer is made and warms up
    attach       KV scales and drift watch, which watch the trainer too
    connect      the publisher, once the engine is up

and when a run falls back (``drift/answer.py``) they are replaced together: a new engine holds
nothing, so what it is sent next is whole, and proven as always. Every trainer rank has one of
these; rank 0 alone has the engine, and the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.calibration import Calibration
from fp8rl.config.run import RunConfig
from fp8rl.drift.watch import DriftWatch
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError
from fp8rl.rollout_batch import prompts_batch, width
from fp8rl.sync.publisher import Publisher
from fp8rl.task import DigitTask
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from fp8rl.warm_up import demonstrations

OpenEngine = Callable[[EngineSettings, Path], AbstractContextManager[RolloutEngine]]


class Serving:
    """Use it in a ``with`` block, at whose end no engine is left; see the module's docstring.

    Attributes:
        engine: rank 0's; None elsewhere.
        calibration: of the KV scales; None where the cache is BF16. From ``attach`` on.
        drift: the watch, whether or not probes are due. From ``attach`` on.
        publisher: from ``connect`` on.
    """

    engine: RolloutEngine | None
    calibration: Calibration | None
    drift: DriftWatch
    publisher: Publisher

    def __init__(
        self, config: RunConfig, task: DigitTask, folder: Path, open_engine: OpenEngine
    ) -> None:
        """Start the engine, on rank 0, and return at once.

        Args:
            config: the run, with the rollout that it goes on with.
            task: gives the vocabulary and the lengths.
            folder: the run's, for the engine's log.
            open_engine: starts the engine, or gives one that has served before.
        """
        self._task, self._folder, self._open_engine = task, folder, open_engine
        self._opened = ExitStack()
        self._start(config)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the publisher and the engine."""
        self._opened.__exit__(kind, error, traceback)

    def attach(self, trainer: MegatronTrainer) -> None:
        """Make what watches engine and trainer."""
        self._trainer = trainer
        self.drift = DriftWatch(self._config, trainer, self.engine, self.settings.plan())
        self.calibration = self._calibration(trainer) if self.settings.fp8_kv else None

    def connect(self) -> None:
        """Wait until the engine is up and introduce the publisher: a collective of all ranks.

        Raises:
            EngineDiedError: the engine did not start. EngineError: it is not what the plan says.
        """
        layers = self._config.model.num_layers if self.settings.fp8_kv else 0
        publisher = Publisher(self.settings.plan(), self.engine, kv_layers=layers)
        self.publisher = self._opened.enter_context(publisher)
        dist.barrier()  # the other ranks wait for it too, and stop with rank 0 at Ctrl-C

    def restart(self, config: RunConfig) -> None:
        """Go on with another rollout, in a new engine: a collective of all ranks.

        KV scales and drift watch keep what they know. The old engine has ended before the new one
        starts; the new one serves nothing before it is sent a version.

        Raises:
            EngineError: it did not start, or is not what the plan says.
        """
        state = self.state()
        self._opened.close()
        try:
            self._start(config)
            self.attach(self._trainer)
            self.load_state(state)
            self.connect()
        except EngineError as error:
            raise type(error)(
                f"the run falls back to {config.rollout.precision}, but the new engine did not "
                f"come up; --resume tries it again: {error}"
            ) from error

    def state(self) -> dict[str, Tensor]:
        """What the next step needs, for a checkpoint: flat CPU tensors."""
        return self.drift.state() | (self.calibration.state() if self.calibration else {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned, of this precision or the one before it."""
        self.drift.load_state(state)
        if self.calibration is not None:
            self.calibration.load_state(state)

    def _start(self, config: RunConfig) -> None:
        self._config, self.settings = config, engine_settings(config, self._task)
        self.engine = None
        if dist.get_rank() == 0:
            opened = self._open_engine(self.settings, self._folder)
            self.engine = self._opened.enter_context(opened)

    def _calibration(self, trainer: MegatronTrainer) -> Calibration:
        """How this run gets its KV scales."""
        config, task = self._config, self._task

        def prompts(version: int) -> TokenBatch:
            return prompts_batch(task, task.train_prompts(version, config.rollout.prompts_per_step))

        fixed = demonstrations(config, task, config.warmup.steps)  # after the last of the warm-up
        return Calibration(config.kv_scales, trainer, self.engine, prompts=prompts, fixed=fixed)


def engine_settings(config: RunConfig, task: DigitTask) -> EngineSettings:
    """The engine that this run needs."""
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    longest = width(task) + 1  # rows are measured whole, and vLLM wants room for a token after them
    return EngineSettings(
        hf_config=hf_config(config.model, task.vocab_size, longest),
        precision=config.rollout.precision,
        max_model_len=longest,
        max_num_seqs=rows,
        kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30),
        seed=config.seed,
        activations=config.rollout.activations,
        scale_format=config.rollout.scale_format,
        router=config.rollout.router,
    )
