"""One RL run: the loop itself, on one page. What it stands on is set up in ``session.py``.

Version v of the policy is the policy after v steps. A step

    restart    where drift is answered by falling back: a new engine, with less in FP8
    observe    q, k, v of version v on the batch just trained -> KV scales that carry v
    publish    quantize version v, send it with its scales; the engine proves and commits it
    rollout    groups of responses, each token with its behaviour log-prob and version
    routes     with experts: do engine and trainer send tokens to the same? (``routing.py``)
    drift      where it is due: which layers of the engine compute otherwise, and why (``drift/``)
    score      the same tokens under the trainer's version v; what the KV scales clip and lose
    train      importance weights for the difference between the two, and the corrected loss
               (``trainer/learning.py``) -> version v + 1

so every token is sampled by the weights being trained; or, where ``rollout.segment_tokens`` cuts
long responses, by those of the step that made it (``segments.py``). The last version is published
and evaluated too. Runs on every trainer rank; rank 0 alone talks to the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fp8rl.config.run import RunConfig
from fp8rl.drift.answer import tightened
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.quant import KVScales
from fp8rl.rollout_batch import RolloutBatch, examples_batch, rollout_batch, share
from fp8rl.routing import compare_routes
from fp8rl.run_dir import Metrics
from fp8rl.serving import OpenEngine
from fp8rl.session import Session, open_session
from fp8rl.stopping import StopRequest
from fp8rl.trainer.learning import learn


def train(
    config: RunConfig,
    resume: bool,
    command: str,
    *,
    open_engine: OpenEngine = RolloutEngine,
    draws: bool = True,
) -> Path:
    """Run ``config`` to its end and return the run's folder.

    Args:
        config: the run; ``config.run_dir`` is made, or with ``resume`` continued.
        resume: go on from the folder's last checkpoint.
        command: the command line that repeats the run, for the report.
        open_engine: starts the engine, or gives one that has served before.
        draws: whether to end with picture and report.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run is saved after the step that was running.
        Errors of the rooms, EngineError, RunDirError: see there; the run can be resumed.
    """
    session = open_session(
        config, resume=resume, command=command, open_engine=open_engine, draws=draws
    )
    with session as run, StopRequest() as stop:
        for version in range(run.version, config.steps + 1):
            run.record(step(run, version))
            if version == config.steps:
                break
            asked = stop.agreed()
            run.save(version + 1, now=asked or run.falls_back)  # what was done, before a restart
            if asked:
                raise KeyboardInterrupt
    return config.run_dir


def step(run: Session, version: int) -> Metrics:
    """Publish ``version``, and unless it is the last, learn version + 1 from it."""
    metrics: Metrics = {"step": version, "version": version}
    if run.falls_back:
        with run.phase("restart"):
            run.fall_back()
    config = run.config
    if config.drift.answer == "fall-back":
        metrics["drift/precision"] = config.rollout.precision
    with run.phase("observe"):
        anew = run.drift.recalibrates
        scales = run.calibration.measure(version, anew=anew) if run.calibration else None
    publish(run, version, scales, metrics)
    if version % config.eval_every == 0 or version == config.steps:
        with run.phase("eval"):
            evaluate(run, version, metrics)
    if version == config.steps:
        return metrics
    with run.phase("rollout"):
        rollout = sample(run, version, metrics)
    if config.model.is_moe:
        with run.phase("routes"):
            metrics |= compare_routes(run.trainer, run.engine, rollout.batch, version)
    if run.drift.due(version):
        with run.phase("drift"):
            probe(run, rollout, version, metrics)
    old_logprobs = None
    if config.correction.mode == "decoupled":
        with run.phase("score"):
            old_logprobs = score(run, rollout, metrics)
    with run.phase("train"):
        if tightens := run.drift.tightens:
            config = config.model_copy(update={"correction": tightened(config.correction)})
        metrics |= learn(config, run.trainer, rollout, old_logprobs, version)
    if config.drift.answer in ("recalibrate", "tighten"):
        metrics["drift/answered"] = int(tightens or anew)
    if run.calibration:
        run.calibration.trained = rollout.batch
    return metrics


def publish(
    run: Session, version: int, scales: KVScales | Callable[[], KVScales] | None, metrics: Metrics
) -> None:
    """Send ``version`` to the engine; when this returns the engine has proven that it holds it."""
    with run.phase("publish"):
        report = run.publisher.publish(run.trainer.source(), version=version, kv_scales=scales)
        if run.calibration:
            metrics |= run.calibration.confirm(report.kv_scales if report else None)
    if report is not None:
        metrics |= {
            "sync/bytes": report.nbytes,
            "sync/bf16_bytes": report.bf16_nbytes,
            "sync/seconds": report.quantize_seconds + report.engine_seconds,
            "sync/quantize_seconds": report.quantize_seconds,
            "sync/engine_seconds": report.engine_seconds,
            "sync/kv_seconds": report.kv_seconds,
        }


def probe(run: Session, rollout: RolloutBatch, version: int, metrics: Metrics) -> None:
    """Compare engine and trainer layer by layer; say what is new and wrong."""
    scales = run.calibration.in_use if run.calibration else None
    found = run.drift.probe(rollout.batch, version, scales)
    metrics |= found
    for warning in run.drift.warnings(found):
        run.progress.message(warning)
    if fall := run.drift.fall_back(found):
        metrics |= fall.metrics
        run.progress.message(fall.line)


def score(run: Session, rollout: RolloutBatch, metrics: Metrics) -> Tensor:
    """Log-probs of the rollout under the trainer; and how its KV scales did on these tokens."""
    observer = run.calibration.watch() if run.calibration else None
    scores = run.trainer.score(rollout.batch, observer)
    assert scores.entropy is not None
    metrics["policy/entropy"] = float(scores.entropy[rollout.batch.response_mask].mean())
    if run.calibration is not None and observer is not None:
        metrics |= run.calibration.rates(observer.observation().reduced())
        for warning in run.calibration.warnings(metrics):
            run.progress.message(warning)
    return scores.logprobs


def sample(run: Session, version: int, metrics: Metrics) -> RolloutBatch:
    """Roll out under ``version`` until a batch of groups has ended; the same on every rank."""
    config, task = run.config.rollout, run.task
    rows = config.prompts_per_step * config.samples_per_prompt
    mine = None
    if run.engine is not None:
        extend = partial(
            run.engine.extend,
            version=version,
            stop_token=task.eos_id,
            temperature=config.temperature,
        )
        mine = rollout_batch(task, run.pool.take(extend, version))
        metrics |= {
            "rollout/tokens": run.pool.tokens,
            "rollout/tokens_per_second": run.pool.tokens / run.elapsed("rollout"),
            "rollout/segments": run.pool.calls,
            "rollout/unfinished": run.pool.unfinished,
            "rollout/kv_cache_tokens": run.engine.kv_cache_tokens,
        }
    made = share(task, rows, mine)
    ages = made.ages(version)[made.batch.response_mask].double()
    metrics |= {
        "reward/train": float(made.rewards.mean()),
        "response/mean_length": len(ages) / rows,
        "rollout/mean_age": float(ages.mean()),
        "rollout/max_age": int(ages.max()),
    }
    return made


def evaluate(run: Session, version: int, metrics: Metrics) -> None:
    """The reward on held-out prompts at the temperature of training: sampled, and expected.

    ``reward/heldout`` is the mean over one sample of the engine for each prompt. One response alone
    is right, so the trainer's own policy can be judged without sampling and without the engine:
    ``reward/heldout_trainer`` is the mean probability that it gives the answer.
    """
    prompts = run.task.heldout_prompts()
    answers = [(prompt, run.task.answer(prompt)) for prompt in prompts]
    logprobs = run.trainer.log_probs(examples_batch(run.task, answers)).sum(dim=1)
    metrics["reward/heldout_trainer"] = float(logprobs.exp().mean())
    if run.engine is None:
        return
    sampling = Sampling(
        max_tokens=run.task.max_response_tokens,
        stop_token=run.task.eos_id,
        temperature=run.config.rollout.temperature,
    )
    groups = run.engine.generate(prompts, version=version, sampling=sampling, seed=0)
    rewards = [run.task.reward(p, g[0].tokens) for p, g in zip(prompts, groups, strict=True)]
    metrics["reward/heldout"] = float(torch.tensor(rewards).mean())
