"""What a run stands on: folder, task, engine, trainer, publisher, checkpoint; set up, torn down.

``open_session`` brings everything up in an order that overlaps the engine's start with the
warm-up, and takes everything down whatever happens: no process and no shared memory stays behind.
The loop (``loop.py``) is given a ``Session`` and asks nothing else of the world.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from fp8rl import checkpoint
from fp8rl.batch import TokenBatch
from fp8rl.calibration import Calibration
from fp8rl.config.file import dump_config
from fp8rl.config.rollout import FP8_CACHE
from fp8rl.config.run import RunConfig
from fp8rl.drift.watch import DriftWatch
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.environment import environment
from fp8rl.progress import Progress
from fp8rl.report.summary import closing_table, result, write_report
from fp8rl.report.words import describe
from fp8rl.rollout_batch import prompts_batch, width
from fp8rl.run_dir import Metrics, RunDir
from fp8rl.segments import Bounds, SegmentPool, first_seed
from fp8rl.sync.publisher import Publisher
from fp8rl.task import DigitTask, TokenIds
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from fp8rl.warm_up import demonstrations, load_start, warm_up

OpenEngine = Callable[[EngineSettings, Path], AbstractContextManager[RolloutEngine]]


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
    pool: SegmentPool  # of the responses begun; stays empty on other ranks
    progress: Progress
    console: Console
    version: int  # the first version to publish
    calibration: Calibration | None  # of the KV scales; None where the cache is BF16
    drift: DriftWatch
    draws: bool  # picture and report at the end
    _began: dict[str, float] = field(default_factory=dict)

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
                self.trainer.state()
                | self.pool.state()
                | (self.calibration.state() if self.calibration else {})
                | self.drift.state(),
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
        settings = engine_settings(config, task)
        engine = None
        if rank == 0:  # it comes up while the trainer warms up
            engine = stack.enter_context(open_engine(settings, folder.path))
        trainer = MegatronTrainer(config, task.vocab_size, settings.plan())
        console = Console()
        title = describe(config.model_dump(mode="json"))
        progress = Progress(config.steps, title, console, enabled=rank == 0)
        display = stack.enter_context(ExitStack())
        display.enter_context(progress)
        calibration = None
        if config.rollout.precision in FP8_CACHE:
            calibration = _calibration(config, task, trainer, engine)
            if caveat := calibration.caveat():
                progress.message(caveat)
        pool = segment_pool(config, task)
        drift = DriftWatch(config, trainer, engine, settings.plan())
        states: list[SegmentPool | DriftWatch | Calibration] = [pool, drift]
        states += [calibration] if calibration else []
        version = _restore(config, folder, trainer, states, task, rank, resume, progress)
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
            pool=pool,
            progress=progress,
            console=console,
            version=version,
            calibration=calibration,
            drift=drift,
            draws=draws,
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


def _calibration(
    config: RunConfig, task: DigitTask, trainer: MegatronTrainer, engine: RolloutEngine | None
) -> Calibration:
    """How this run gets its KV scales."""

    def prompts(version: int) -> TokenBatch:
        return prompts_batch(task, task.train_prompts(version, config.rollout.prompts_per_step))

    fixed = demonstrations(config, task, config.warmup.steps)  # after the last of the warm-up
    return Calibration(config.kv_scales, trainer, engine, prompts=prompts, fixed=fixed)


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


def _restore(
    config: RunConfig,
    folder: RunDir,
    trainer: MegatronTrainer,
    states: Sequence[SegmentPool | DriftWatch | Calibration],
    task: DigitTask,
    rank: int,
    resume: bool,
    progress: Progress,
) -> int:
    """Load the last checkpoint, or the start, or warm up; returns the version to publish."""
    last = checkpoint.latest(folder.checkpoints) if resume else None
    if last is None:
        if rank == 0:
            folder.truncate_metrics(after_step=-1)
        if config.warmup.start_from is not None:
            load_start(config.warmup.start_from, config, trainer)
        else:
            warm_up(config, trainer, task, progress)
        return 0
    saved = checkpoint.load(last, rank=rank, world_size=config.world_size)
    saved.require(name for part in states for name in part.state())
    ours = {n for n in saved.tensors if n.startswith(("calibration/", "drift/", "pool/"))}
    trainer.load_state({n: t for n, t in saved.tensors.items() if n not in ours})
    for part in states:
        part.load_state(saved.tensors)
    if rank == 0:  # steps after the checkpoint are done again
        folder.truncate_metrics(after_step=saved.step - 1)
    progress.message(f"resumed at version {saved.step} from {last}")
    return saved.step
