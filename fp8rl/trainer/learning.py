"""Learning from one rollout batch: the correction, the loss, and its optimizer steps.

    decoupled   the batch was scored: weights and rejections are known before the first step, and
                every minibatch is divided by its own kept tokens
    bypass      it was not: each micro-batch is corrected under the policy being stepped, sums are
                taken, and the gradient is divided by what was kept once all of them are through

A minibatch is a run of whole groups. Metrics that only the last pipeline stage knows are shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_up
from itertools import takewhile

import torch
from torch import Tensor

from fp8rl.config.run import RunConfig
from fp8rl.correction import (
    Correction,
    Counts,
    Groups,
    LossOutput,
    by_age,
    by_position,
    correct,
    correction_metrics,
    count,
    drop_mastered,
    group_advantages,
    group_metrics,
    policy_loss,
    total,
)
from fp8rl.rollout_batch import RolloutBatch
from fp8rl.run_dir import Metrics
from fp8rl.trainer.megatron import MegatronTrainer

OLDEST_AGE = 4  # tokens of this age and older are one group in the metrics


def learn(
    config: RunConfig,
    trainer: MegatronTrainer,
    rollout: RolloutBatch,
    old_logprobs: Tensor | None,
    version: int,
) -> Metrics:
    """Take the optimizer steps of one batch, one for each minibatch of whole groups.

    Args:
        config: the run's.
        trainer: whose weights take the steps.
        rollout: the batch.
        old_logprobs: the trainer's log-probs of it under `version`, fp32 [B, S]; None in bypass
            mode.
        version: the weights that are trained; tokens of older ones are reported by their age.
    """
    mask = rollout.batch.response_mask
    advantages = group_advantages(
        rollout.rewards,
        config.rollout.samples_per_prompt,
        normalize=config.trainer.normalize_advantages,
    )
    metrics: Metrics = {}
    reference = rollout.logprobs if old_logprobs is None else old_logprobs
    allowed = mask
    if config.loss.mastered is not None:
        # -log p over a policy's own samples estimates its entropy; pi_old's would add the KL
        entropy = -rollout.logprobs[mask].mean()
        allowed = drop_mastered(config.loss.mastered, reference, advantages, mask, entropy)
        metrics["policy/mastered_fraction"] = float((mask & ~allowed).sum() / mask.sum())
    if old_logprobs is None:
        return metrics | _bypass(config, trainer, rollout, advantages, allowed)
    correction = correct(config.correction.stages, old_logprobs, rollout.logprobs, mask)
    metrics |= correction.metrics()
    for groups in _groups(rollout, version):
        metrics |= group_metrics(groups, old_logprobs, rollout.logprobs, mask)
    steps = _decoupled(config, trainer, rollout, old_logprobs, advantages, correction, allowed)
    return metrics | steps


def _groups(rollout: RolloutBatch, version: int) -> Iterator[Groups]:
    """By position 0, 1 to 3, 4 to 15, ...; and by age, where not all tokens are of `version`."""
    mask = rollout.batch.response_mask
    width = mask.shape[1]  # that of the whole run, so that every step has the same names
    yield by_position(mask, list(takewhile(lambda n: n < width, (4**k for k in count_up()))))
    ages = by_age(rollout.ages(version), OLDEST_AGE)
    if ages.index.any():
        yield ages


def _decoupled(
    config: RunConfig,
    trainer: MegatronTrainer,
    rollout: RolloutBatch,
    old_logprobs: Tensor,
    advantages: Tensor,
    correction: Correction,
    allowed: Tensor,
) -> Metrics:
    """Steps with weights that are known beforehand."""
    steps, found = [], []
    for rows in _minibatches(config, rollout):
        old, advantage, weights = old_logprobs[rows], advantages[rows], correction.weights[rows]
        kept = correction.kept[rows] & allowed[rows]
        counts, outputs = count(kept), list[LossOutput]()

        def loss_fn(
            logprobs: Tensor,
            part: slice,
            old: Tensor = old,
            advantage: Tensor = advantage,
            weights: Tensor = weights,
            kept: Tensor = kept,
            counts: Counts = counts,
            outputs: list[LossOutput] = outputs,
        ) -> Tensor:
            taken = old[part], advantage[part], weights[part], kept[part]
            outputs.append(policy_loss(config.loss, logprobs, *taken, counts=counts))
            return outputs[-1].loss

        batch = rollout.batch.rows(rows)
        steps.append(trainer.update(batch, loss_fn, config.trainer.learning_rate))
        found.append(_added(outputs))
    return {**_means(steps), **trainer.from_last_stage(_means(found))}


def _bypass(
    config: RunConfig,
    trainer: MegatronTrainer,
    rollout: RolloutBatch,
    advantages: Tensor,
    allowed: Tensor,
) -> Metrics:
    """Steps that correct each micro-batch under the policy being stepped."""
    steps, found, statistics = [], [], []
    for rows in _minibatches(config, rollout):
        behaviour, mask = rollout.logprobs[rows], rollout.batch.response_mask[rows]
        advantage, allow = advantages[rows], allowed[rows]
        outputs = list[LossOutput]()

        def loss_fn(
            logprobs: Tensor,
            part: slice,
            behaviour: Tensor = behaviour,
            mask: Tensor = mask,
            advantage: Tensor = advantage,
            allow: Tensor = allow,
            outputs: list[LossOutput] = outputs,
        ) -> Tensor:
            correction = correct(
                config.correction.stages, logprobs.detach(), behaviour[part], mask[part]
            )
            statistics.append(correction.statistics)
            kept = correction.kept & allow[part]
            taken = behaviour[part], advantage[part], correction.weights, kept
            outputs.append(policy_loss(config.loss, logprobs, *taken, counts=Counts(1, 1)))
            return outputs[-1].loss

        def divisor(outputs: list[LossOutput] = outputs) -> Tensor:
            kept = sum((out.counts for out in outputs), start=Counts(0, 0))
            return torch.as_tensor(kept.divisor(config.loss.aggregation)).clamp(min=1)

        batch = rollout.batch.rows(rows)
        steps.append(trainer.update(batch, loss_fn, config.trainer.learning_rate, divisor=divisor))
        tokens = sum(float(out.counts.tokens) for out in outputs)
        found.append(_added(outputs, divided_by=max(tokens, 1.0)))
    seen = _means(found)
    if statistics:
        stages = config.correction.stages
        seen |= correction_metrics(stages, total(statistics))
    return {**_means(steps), **trainer.from_last_stage(seen)}


def _minibatches(config: RunConfig, rollout: RolloutBatch) -> list[slice]:
    """Runs of whole groups, one for each optimizer step."""
    count = len(rollout.rewards)
    rows = count // config.trainer.minibatches
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _added(outputs: list[LossOutput], *, divided_by: float = 1.0) -> dict[str, float]:
    """Join micro-batches: a maximum stays one, everything else adds up; empty on early stages."""
    joined: dict[str, float] = {}
    for key in outputs[0].metrics if outputs else ():
        values = torch.stack([out.metrics[key] for out in outputs])
        largest = key.endswith("_max")
        joined[key] = float(values.max() if largest else values.sum() / divided_by)
    return joined


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean over a batch's optimizer steps; of a maximum, the largest."""
    return {
        key: max(s[key] for s in steps)
        if key.endswith("_max")
        else sum(s[key] for s in steps) / len(steps)
        for key in (steps[0] if steps else ())
    }
