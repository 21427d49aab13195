"""One RL run: the loop itself, on one page. What it stands on is set up in ``session.py``.

Version v of the policy is the policy after v steps. A step

    observe    q, k, v of version v on the batch just trained -> KV scales that carry v
    publish    quantize version v, send it with its scales; the engine proves and commits it
    rollout    groups of responses, each token with its behaviour log-prob and version
    score      the same tokens under the trainer's version v; what the KV scales clip and lose
    train      importance weights for the difference between the two, and the corrected loss
               (``learning.py``) -> version v + 1

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

from fp8rl.config import RunConfig
from fp8rl.learning import learn
from fp8rl.quant import KVScales
from fp8rl.rollout import Sampling
from fp8rl.rollout_batch import RolloutBatch, rollout_batch, share
from fp8rl.run_dir import Metrics
from fp8rl.session import Session, open_session
from fp8rl.stopping import StopRequest


def train(config: RunConfig, resume: bool, command: str) -> Path:
    """Run ``config`` to its end and return the run's folder.

    Args:
        config: the run; ``config.run_dir`` is made, or with ``resume`` continued.
        resume: go on from the folder's last checkpoint.
        command: the command line that repeats the run, for the report.

    Raises:
        KeyboardInterrupt: Ctrl-C; the run is saved after the step that was running.
        Errors of the rooms, EngineError, RunDirError: see there; the run can be resumed.
    """
    with open_session(config, resume=resume, command=command) as run, StopRequest() as stop:
        for version in range(run.version, config.steps + 1):
            run.record(step(run, version))
            if version == config.steps:
                break
            asked = stop.agreed()
            run.save(version + 1, now=asked)
            if asked:
                raise KeyboardInterrupt
    return config.run_dir


def step(run: Session, version: int) -> Metrics:
    """Publish ``version``, and unless it is the last, learn version + 1 from it."""
    config = run.config
    metrics: Metrics = {"step": version, "version": version}
    with run.phase("observe"):
        scales = run.calibration.measure(version) if run.calibration else None
    publish(run, version, scales, metrics)
    if version % config.eval_every == 0 or version == config.steps:
        with run.phase("eval"):
            evaluate(run, version, metrics)
    if version == config.steps:
        return metrics
    with run.phase("rollout"):
        rollout = sample(run, version, metrics)
    old_logprobs = None
    if config.correction.mode == "decoupled":
        with run.phase("score"):
            old_logprobs = score(run, rollout, metrics)
    with run.phase("train"):
        metrics |= learn(config, run.trainer, rollout, old_logprobs, version)
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


def score(run: Session, rollout: RolloutBatch, metrics: Metrics) -> Tensor:
    """Log-probs of the rollout under the trainer; and how its KV scales did on these tokens."""
    if run.calibration is None:
        return run.trainer.log_probs(rollout.batch)
    observer = run.calibration.watch()
    logprobs = run.trainer.log_probs(rollout.batch, observer)
    metrics |= run.calibration.rates(observer.observation().reduced())
    for warning in run.calibration.warnings(metrics):
        run.progress.message(warning)
    return logprobs


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
    """Mean reward of one sample for each held-out prompt, at the temperature of training."""
    if run.engine is None:
        return
    prompts = run.task.heldout_prompts()
    sampling = Sampling(
        max_tokens=run.task.max_response_tokens,
        stop_token=run.task.eos_id,
        temperature=run.config.rollout.temperature,
    )
    groups = run.engine.generate(prompts, version=version, sampling=sampling, seed=0)
    rewards = [run.task.reward(p, g[0].tokens) for p, g in zip(prompts, groups, strict=True)]
    metrics["reward/heldout"] = float(torch.tensor(rewards).mean())
