"""From the engine's samples to tensors that every trainer rank holds.

Rows stand in the order of prompts, the samples of one prompt together, padded on the right to one
width for the whole run, so that ranks other than 0 know every shape without being told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.errors import StaleWeightsError
from fp8rl.rollout import Sample
from fp8rl.task import DigitTask, TokenIds


@dataclass(frozen=True)
class RolloutBatch:
    """What a step learns from.

    batch: tokens and response mask [B, S]. logprobs: fp32 [B, S], those the engine sampled with,
    0 outside the responses. rewards: fp32 [B].
    """

    batch: TokenBatch
    logprobs: Tensor
    rewards: Tensor


def width(task: DigitTask) -> int:
    """Tokens of the longest row of any step."""
    return task.max_prompt_tokens + task.max_response_tokens


def examples_batch(task: DigitTask, examples: Sequence[tuple[TokenIds, TokenIds]]) -> TokenBatch:
    """Prompts with given responses as a batch."""
    return _pad(task, [(prompt, answer) for prompt, answer in examples])[0]


def prompts_batch(task: DigitTask, prompts: Sequence[TokenIds]) -> TokenBatch:
    """Prompts alone, as sequences to run a forward on: all but the first token count as given."""
    return _pad(task, [(prompt[:1], prompt[1:]) for prompt in prompts])[0]


def rollout_batch(
    task: DigitTask, prompts: Sequence[TokenIds], groups: Sequence[Sequence[Sample]], version: int
) -> RolloutBatch:
    """Samples of ``prompts`` as a batch, with their rewards.

    Raises:
        StaleWeightsError: a token was sampled by weights other than ``version``.
    """
    pairs = [(prompt, s) for prompt, group in zip(prompts, groups, strict=True) for s in group]
    for prompt, sample in pairs:
        if set(sample.versions) != {version}:
            raise StaleWeightsError(
                f"a sample of {task.decode(prompt)!r} comes from versions "
                f"{sorted(set(sample.versions))}, expected {version}"
            )
    batch, mask = _pad(task, [(prompt, sample.tokens) for prompt, sample in pairs])
    logprobs = torch.zeros(mask.shape)
    logprobs[mask] = torch.tensor([lp for _, sample in pairs for lp in sample.logprobs])
    rewards = torch.tensor([task.reward(prompt, sample.tokens) for prompt, sample in pairs])
    return RolloutBatch(batch, logprobs, rewards)


def share(task: DigitTask, rows: int, make: Callable[[], RolloutBatch] | None) -> RolloutBatch:
    """Make the batch on rank 0 and copy it to every rank.

    Args:
        task: gives the width.
        rows: responses in the batch.
        make: called on rank 0; None elsewhere.
    """
    shape = (rows, width(task))
    if make is not None:
        made = make()
        parts = [made.batch.tokens, made.batch.response_mask, made.logprobs, made.rewards]
    else:
        parts = [
            torch.empty(shape, dtype=torch.int64),
            torch.empty(shape, dtype=torch.bool),
            torch.empty(shape),
            torch.empty(rows),
        ]
    if dist.get_world_size() > 1:
        for part in parts:
            dist.broadcast(part, src=0)
    tokens, mask, logprobs, rewards = parts
    return RolloutBatch(TokenBatch(tokens, mask), logprobs, rewards)


def _pad(
    task: DigitTask, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[TokenBatch, Tensor]:
    tokens = torch.full((len(rows), width(task)), task.pad_id, dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) : end] = True
    return TokenBatch(tokens, mask), mask
