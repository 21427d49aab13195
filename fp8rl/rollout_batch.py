"""From the engine's samples to tensors that every trainer rank holds.

Rows stand in the order of prompts, the samples of one prompt together, padded on the right to one
width for the whole run, so that ranks other than 0 know every shape without being told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float32, Int64
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.segments import Group
from fp8rl.task import DigitTask, TokenIds


@dataclass(frozen=True)
class RolloutBatch:
    """What a step learns from.

    batch: tokens and response mask [B, S]. logprobs: fp32 [B, S], those the engine sampled with.
    versions: int64 [B, S], the weight version that sampled each token. Both are 0 outside the
    responses. rewards: fp32 [B].
    """

    batch: TokenBatch
    logprobs: Float32[Tensor, "batch time"]
    versions: Int64[Tensor, "batch time"]
    rewards: Float32[Tensor, " batch"]

    def ages(self, version: int) -> Int64[Tensor, "batch time"]:
        """How many versions before ``version`` each token was sampled, 0 outside the responses."""
        return torch.where(self.batch.response_mask, version - self.versions, 0)


def width(task: DigitTask) -> int:
    """Tokens of the longest row of any step."""
    return task.max_prompt_tokens + task.max_response_tokens


def examples_batch(task: DigitTask, examples: Sequence[tuple[TokenIds, TokenIds]]) -> TokenBatch:
    """Prompts with given responses as a batch."""
    return _pad(task, [(prompt, answer) for prompt, answer in examples])[0]


def prompts_batch(task: DigitTask, prompts: Sequence[TokenIds]) -> TokenBatch:
    """Prompts alone, as sequences to run a forward on: all but the first token count as given."""
    return _pad(task, [(prompt[:1], prompt[1:]) for prompt in prompts])[0]


def rollout_batch(task: DigitTask, groups: Sequence[Group]) -> RolloutBatch:
    """Finished groups as a batch, with their rewards."""
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
    batch, mask = _pad(task, [(prompt, sample.tokens) for prompt, sample in pairs])
    logprobs = torch.zeros(mask.shape)
    logprobs[mask] = torch.tensor([lp for _, sample in pairs for lp in sample.logprobs])
    versions = torch.zeros(mask.shape, dtype=torch.int64)
    versions[mask] = torch.tensor([v for _, sample in pairs for v in sample.versions])
    rewards = torch.tensor([task.reward(prompt, sample.tokens) for prompt, sample in pairs])
    return RolloutBatch(batch, logprobs, versions, rewards)


def share(task: DigitTask, rows: int, made: RolloutBatch | None) -> RolloutBatch:
    """Copy rank 0's batch to every rank.

    Args:
        task: gives the width.
        rows: responses in the batch.
        made: the batch on rank 0; None elsewhere.
    """
    shape = (rows, width(task))
    if made is not None:
        parts = [made.batch.tokens, made.batch.response_mask, made.logprobs, made.versions]
        parts.append(made.rewards)
    else:
        parts = [
            torch.empty(shape, dtype=torch.int64),
            torch.empty(shape, dtype=torch.bool),
            torch.empty(shape),
            torch.empty(shape, dtype=torch.int64),
            torch.empty(rows),
        ]
    if dist.get_world_size() > 1:
        for part in parts:
            dist.broadcast(part, src=0)
    tokens, mask, logprobs, versions, rewards = parts
    return RolloutBatch(TokenBatch(tokens, mask), logprobs, versions, rewards)


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
