"""What a run stands on: folder, task, trainer, checkpoint and what samples; set up, torn down.

``open_session`` brings everything up in an order that overlaps the engine's start with the
warm-up, and takes everything down whatever happens: no process and no shared memory stays behind.
The loop (``loop.py``) is given a ``Session`` and asks nothing else of the world. The engine and
what goes with it are a ``Serving``, which a run that falls back replaces by another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from fp8rl import checkpoint
from fp8rl.calibration import Calibration
from fp8rl.config.file import dump_config
from fp8rl.config.rollout import RolloutConfig
from fp8rl.config.run import RunConfig
from fp8rl.drift.answer import fallen_back
from fp8rl.drift.watch import FALLEN_BACK, DriftWatch, fallen_back_in
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.environment import environment
from fp8rl.progress import Progress
from fp8rl.report.summary import closing_table, result, write_report
from fp8rl.report.words import describe
from fp8rl.run_dir import Metrics, RunDir
from fp8rl.segments import Bounds, SegmentPool, first_seed
from fp8rl.serving import OpenEngine, Serving
from fp8rl.sync.publisher import Publisher
from fp8rl.task import DigitTask, TokenIds
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.warm_up import load_start, warm_up


@dataclass
class Session:
    """A run in progress, on one trainer rank."""

    config: RunConfig  # with the rollout that it goes on with, where it has fallen back
    command: str
    rank: int
    folder: RunDir
    task: DigitTask
    trainer: MegatronTrainer
    serving: Serving
    pool: SegmentPool  # of the responses begun; stays empty on other ranks
    progress: Progress
    console: Console
    version: int  # the first version to publish
    draws: bool  # picture and report at the end
    _began: dict[str, float] = field(default_factory=dict)

    @property
    def engine(self) -> RolloutEngine | None:
        """What samples; on rank 0 alone."""
        return self.serving.engine

    @property
    def publisher(self) -> Publisher:
        """What sends it weights."""
        return self.serving.publisher

    @property
    def calibration(self) -> Calibration | None:
        """What measures its KV scales; None where the cache is BF16."""
        return self.serving.calibration

    @property
    def drift(self) -> DriftWatch:
        """What compares it with the trainer."""
        return self.serving.drift

    @property
    def falls_back(self) -> bool:
        """Whether the next step needs an engine in another precision: the same on every rank."""
        return self.drift.rollout != self.config.rollout

    def fall_back(self) -> None:
        """Replace the engine by one in the precision that drift asks for: a collective.

        Raises:
            EngineError: it does not come up.
        """
        self.config = _with_rollout(self.config, self.drift.rollout)
        self.serving.restart(self.config)

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
                self.trainer.state() | self.pool.state() | self.serving.state(),
                rank=self.rank,
                world_size=self.config.world_size,
                extra={},
                barrier=dist.barrier,
            )


@contextmanager
def open_session(
    config: RunConfig,
    *,
    resume: bool,
    command: str,
    open_engine: OpenEngine = RolloutEngine,
    draws: bool = True,
) -> Iterator[Session]:
    """Bring a run up, fresh or from its last checkpoint, and down again.

    When the block ends well, result.json and (where it ``draws``) picture and report are written,
    and the closing table is printed. ``open_engine`` may give an engine that has served before.

    Raises:
        RunDirError: the folder is in use, holds another run, or holds none to resume.
        CheckpointError: its last checkpoint is broken. EngineDiedError: the engine did not start.
    """
    task = DigitTask(config.task, config.seed)
    with ExitStack() as stack:
        rank = stack.enter_context(init_distributed(config))
        folder = _open_folder(config, resume, rank)
        stack.enter_context(folder.locked() if rank == 0 else nullcontext())
        saved = _saved(config, folder, rank) if resume else None
        if saved is not None:
            fallen = fallen_back_in(saved.tensors)
            config = _with_rollout(config, fallen_back(config.rollout, fallen))
        serving = stack.enter_context(Serving(config, task, folder.path, open_engine))
        trainer = MegatronTrainer(config, task.vocab_size, serving.settings.plan())
        console = Console()
        title = describe(config.model_dump(mode="json"))
        progress = Progress(config.steps, title, console, enabled=rank == 0)
        display = stack.enter_context(ExitStack())
        display.enter_context(progress)
        serving.attach(trainer)
        if serving.calibration and (caveat := serving.calibration.caveat()):
            progress.message(caveat)
        pool = segment_pool(config, task)
        if saved is None:
            version = _begin(config, folder, trainer, task, rank, progress)
        else:
            version = _restore(saved, folder, trainer, pool, serving, rank)
            progress.message(
                f"resumed at version {version} from its checkpoint; the engine is in "
                f"{config.rollout.precision}"
            )
        del saved  # it is as large as the trainer
        with progress.phase("waiting for the rollout engine", timed=False):
            serving.connect()
        session = Session(
            config=config,
            command=command,
            rank=rank,
            folder=folder,
            task=task,
            trainer=trainer,
            serving=serving,
            pool=pool,
            progress=progress,
            console=console,
            version=version,
            draws=draws,
        )
        if version == 0:
            session.save(0, now=True)
        yield session
        display.close()
        if rank == 0:
            _conclude(session)


def segment_pool(config: RunConfig, task: DigitTask) -> SegmentPool:
    """The pool from which this run's batches come, empty."""
    rollout, longest = config.rollout, task.max_response_tokens
    bounds = Bounds(
        groups=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        segment_tokens=rollout.segment_tokens or longest,
        max_tokens=longest,
        stop_token=task.eos_id,
        seed=first_seed(config.seed),
    )

    @lru_cache(maxsize=2)
    def prompts(step: int) -> list[TokenIds]:
        return task.train_prompts(step, rollout.prompts_per_step)

    def prompt(draw: int) -> TokenIds:
        step, place = divmod(draw, rollout.prompts_per_step)
        return prompts(step)[place]

    return SegmentPool(bounds, prompt)


def _conclude(run: Session) -> None:
    """Write result.json, the picture and the report; print the closing table."""
    found = result(run.folder, command=run.command, environment=environment())
    run.folder.write_result(found)
    if run.draws:
        write_report(run.folder.path)
    run.console.print(closing_table(found))


def _open_folder(config: RunConfig, resume: bool, rank: int) -> RunDir:
    """Rank 0 makes the folder; the others find it made."""
    path = Path(config.run_dir)
    if rank == 0 and not resume:
        RunDir.create(path, dump_config(config))
    dist.barrier()
    return RunDir.open(path)


def _with_rollout(config: RunConfig, rollout: RolloutConfig) -> RunConfig:
    return config.model_copy(update={"rollout": rollout})


def _saved(config: RunConfig, folder: RunDir, rank: int) -> checkpoint.Checkpoint | None:
    """The last checkpoint; None where the run was stopped before the first."""
    last = checkpoint.latest(folder.checkpoints)
    if last is None:
        return None
    saved = checkpoint.load(last, rank=rank, world_size=config.world_size)
    saved.require([FALLEN_BACK])
    return saved


def _begin(
    config: RunConfig,
    folder: RunDir,
    trainer: MegatronTrainer,
    task: DigitTask,
    rank: int,
    progress: Progress,
) -> int:
    """Load the start, or warm up; returns the version to publish."""
    if rank == 0:
        folder.truncate_metrics(after_step=-1)
    if config.warmup.start_from is not None:
        load_start(config.warmup.start_from, config, trainer)
    else:
        warm_up(config, trainer, task, progress)
    return 0


def _restore(
    saved: checkpoint.Checkpoint,
    folder: RunDir,
    trainer: MegatronTrainer,
    pool: SegmentPool,
    serving: Serving,
    rank: int,
) -> int:
    """Take over what was saved; returns the version to publish."""
    saved.require(pool.state() | serving.state())
    ours = {n for n in saved.tensors if n.startswith(("calibration/", "drift/", "pool/"))}
    trainer.load_state({n: t for n, t in saved.tensors.items() if n not in ours})
    pool.load_state(saved.tensors)
    serving.load_state(saved.tensors)
    if rank == 0:  # steps after the checkpoint are done again
        folder.truncate_metrics(after_step=saved.step - 1)
    return saved.step
