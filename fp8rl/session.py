"""What a run stands on: folder, task, engine, trainer, publisher, checkpoint; set up, torn down.

``open_session`` brings everything up in an order that overlaps the engine's start with the
warm-up, and takes everything down whatever happens: no process and no shared memory stays behind.
The loop (``loop.py``) is given a ``Session`` and asks nothing else of the world.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fp8rl import checkpoint
from fp8rl.batch import TokenBatch
from fp8rl.config import RunConfig, dump_config
from fp8rl.distributed import init_distributed
from fp8rl.environment import environment
from fp8rl.megatron_model import hf_config
from fp8rl.progress import Progress
from fp8rl.report import closing_table, describe, result, write_report
from fp8rl.rollout import EngineSettings, RolloutEngine
from fp8rl.rollout_batch import examples_batch, width
from fp8rl.run_dir import Metrics, RunDir
from fp8rl.sync.publisher import Publisher
from fp8rl.task import DigitTask
from fp8rl.trainer import MegatronTrainer


@dataclass
class Session:
    """A run in progress, on one trainer rank."""

    config: RunConfig
    command: str
    rank: int
    folder: RunDir
    task: DigitTask
    trainer: MegatronTrainer
    publisher: Publisher
    engine: RolloutEngine | None  # on rank 0 alone
    progress: Progress
    console: Console
    version: int  # the first version to publish
    calibration: TokenBatch  # on which the next KV scales are observed
    _began: dict[str, float] = field(default_factory=dict)

    @property
    def fp8_kv(self) -> bool:
        """Whether the engine's KV cache is FP8."""
        return self.config.rollout.precision == "fp8-kv"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show and time a phase of the step."""
        self._began[name] = time.perf_counter()
        with self.progress.phase(name):
            yield

    def elapsed(self, name: str) -> float:
        """Seconds since the phase last began."""
        return time.perf_counter() - self._began[name]

    def record(self, metrics: Metrics) -> None:
        """Write and show the metrics of a step, with the time of its phases."""
        if self.rank != 0:
            return
        seconds = self.progress.phase_seconds()
        metrics |= {f"time/{name}": spent for name, spent in seconds.items()}
        metrics["time/step"] = sum(seconds.values())
        self.folder.append(metrics)
        self.progress.step(metrics)

    def save(self, version: int, *, now: bool) -> None:
        """Checkpoint the state from which ``version`` is published, if it is due or ``now``."""
        if not now and version % self.config.checkpoint_every:
            return
        with self.phase("checkpoint"):
            checkpoint.save(
                self.folder.checkpoints,
                version,
                self.trainer.state() | _calibration_state(self.calibration),
                rank=self.rank,
                world_size=self.config.world_size,
                extra={},
                barrier=dist.barrier,
            )


@contextmanager
def open_session(config: RunConfig, *, resume: bool, command: str) -> Iterator[Session]:
    """Bring a run up, fresh or from its last checkpoint, and down again.

    When the block ends well, result.json, picture and report are written and the closing table is
    printed.

    Raises:
        RunDirError: the folder is in use, holds another run, or holds none to resume.
        CheckpointError: its last checkpoint is broken. EngineDiedError: the engine did not start.
    """
    task = DigitTask(config.task, config.seed)
    with ExitStack() as stack:
        rank = stack.enter_context(init_distributed(config))
        folder = _open_folder(config, resume, rank)
        stack.enter_context(folder.locked() if rank == 0 else nullcontext())
        settings = engine_settings(config, task)
        engine = None
        if rank == 0:  # it comes up while the trainer warms up
            engine = stack.enter_context(RolloutEngine(settings, folder.path))
        trainer = MegatronTrainer(config, task.vocab_size, settings.plan())
        console = Console()
        title = describe(config.model_dump(mode="json"))
        progress = Progress(config.steps, title, console, enabled=rank == 0)
        display = stack.enter_context(ExitStack())
        display.enter_context(progress)
        version, calibration = _restore(config, folder, trainer, task, rank, resume, progress)
        layers = config.model.num_layers if settings.fp8_kv else 0
        with progress.phase("waiting for the rollout engine", timed=False):
            publisher = stack.enter_context(Publisher(settings.plan(), engine, kv_layers=layers))
            dist.barrier()  # the other ranks wait for it too, and stop with rank 0 at Ctrl-C
        session = Session(
            config=config,
            command=command,
            rank=rank,
            folder=folder,
            task=task,
            trainer=trainer,
            publisher=publisher,
            engine=engine,
            progress=progress,
            console=console,
            version=version,
            calibration=calibration,
        )
        if version == 0:
            session.save(0, now=True)
        yield session
        display.close()
        if rank == 0:
            _conclude(session)


def engine_settings(config: RunConfig, task: DigitTask) -> EngineSettings:
    """The engine that this run needs."""
    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return EngineSettings(
        hf_config=hf_config(config.model, task.vocab_size, width(task)),
        precision=config.rollout.precision,
        max_model_len=width(task),
        max_num_seqs=rows,
        kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30),
        seed=config.seed,
    )


def _conclude(run: Session) -> None:
    """Write result.json, the picture and the report; print the closing table."""
    found = result(run.folder, command=run.command, environment=environment())
    run.folder.write_result(found)
    write_report(run.folder.path)
    run.console.print(closing_table(found))


def _open_folder(config: RunConfig, resume: bool, rank: int) -> RunDir:
    """Rank 0 makes the folder; the others find it made."""
    path = Path(config.run_dir)
    if rank == 0 and not resume:
        RunDir.create(path, dump_config(config))
    dist.barrier()
    return RunDir.open(path)


def _restore(
    config: RunConfig,
    folder: RunDir,
    trainer: MegatronTrainer,
    task: DigitTask,
    rank: int,
    resume: bool,
    progress: Progress,
) -> tuple[int, TokenBatch]:
    """Load the last checkpoint, or warm up; returns the version to publish and what to observe."""
    last = checkpoint.latest(folder.checkpoints) if resume else None
    if last is None:
        if rank == 0:
            folder.truncate_metrics(after_step=-1)
        return 0, _warm_up(config, trainer, task, progress)
    saved = checkpoint.load(last, rank=rank, world_size=config.world_size)
    calibration = _calibration_of(saved.tensors)
    trainer.load_state(saved.tensors)
    if rank == 0:  # steps after the checkpoint are done again
        folder.truncate_metrics(after_step=saved.step - 1)
    progress.message(f"resumed at version {saved.step} from {last}")
    return saved.step, calibration


def _warm_up(
    config: RunConfig, trainer: MegatronTrainer, task: DigitTask, progress: Progress
) -> TokenBatch:
    """Supervised steps to a start where reward is low but not zero."""
    settings = config.warmup
    began, loss = time.perf_counter(), float("nan")
    for number in range(settings.steps):
        batch = _demonstrations(config, task, number)
        tokens = batch.response_mask.sum()

        def loss_fn(logprobs: Tensor, rows: slice, tokens: Tensor = tokens) -> Tensor:
            return -logprobs.sum() / tokens  # 0 outside the responses

        with progress.phase(f"warm-up {number + 1}/{settings.steps}", timed=False):
            loss = trainer.update(batch, loss_fn, learning_rate=settings.learning_rate)["loss"]
    trainer.restart_optimizer()
    progress.message(
        f"warm-up: {settings.steps} supervised steps of {settings.batch_size} examples, "
        f"loss {loss:.3f}, {time.perf_counter() - began:.0f} s"
    )
    return _demonstrations(config, task, settings.steps)


def _demonstrations(config: RunConfig, task: DigitTask, number: int) -> TokenBatch:
    shown = task.demonstrations(number, config.warmup.batch_size, config.warmup.slip_rate)
    return examples_batch(task, shown)


def _calibration_state(batch: TokenBatch) -> dict[str, Tensor]:
    return {
        "calibration/tokens": batch.tokens,
        "calibration/response_mask": batch.response_mask.to(torch.uint8),
    }


def _calibration_of(tensors: dict[str, Tensor]) -> TokenBatch:
    """Take the calibration batch out of a checkpoint's tensors; the rest is the trainer's."""
    mask = tensors.pop("calibration/response_mask").bool()
    return TokenBatch(tensors.pop("calibration/tokens"), mask)
