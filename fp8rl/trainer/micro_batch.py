"""Cutting a batch into micro-batches of one size, and choosing rows to observe.

Pipeline stages exchange tensors of one agreed shape, so all micro-batches have the same number of
rows: ``ceil(B / ceil(B / bound))``, the last filled up with empty rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.functional import pad

from fp8rl.batch import TokenBatch
from fp8rl.errors import TrainerError


@dataclass(frozen=True)
class MicroBatch:
    """``rows`` of a batch, then filling (token 0, all masks False); one of ``count``."""

    tokens: Int64[Tensor, "rows time"]
    response_mask: Bool[Tensor, "rows time"]
    token_mask: Bool[Tensor, "rows time"]
    rows: slice
    count: int

    @property
    def real(self) -> int:
        """Rows that are not filling; they come first."""
        return int(self.rows.stop - self.rows.start)


def cut(batch: TokenBatch, bound: int) -> list[MicroBatch]:
    """Cut into the fewest micro-batches of at most ``bound`` rows, all of one size, in order."""
    total = batch.tokens.shape[0]
    count = -(-total // bound)
    size = -(-total // count)
    micros = []
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        fill = (0, 0, 0, size - (rows.stop - rows.start))
        parts = (batch.tokens[rows], batch.response_mask[rows], batch.real[rows])
        tokens, response, real = (pad(part, fill) for part in parts)
        micros.append(MicroBatch(tokens, response, real, rows, -(-total // size)))
    return micros


def sample_rows(lengths: Int64[Tensor, " batch"], max_tokens: int) -> Int64[Tensor, " rows"]:
    """Choose rows in a fixed shuffled order while their tokens fit ``max_tokens``.

    Shuffled, since neighbours in a batch answer the same prompt; fixed, so that a run repeats.

    Raises:
        TrainerError: the first row alone is too long.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    fitting = order[lengths[order].cumsum(0) <= max_tokens]
    if not len(fitting):
        raise TrainerError(
            f"max_tokens is {max_tokens}, but a sequence has {int(lengths[order[0]])} tokens; "
            "raise kv_scales.calibration_tokens"
        )
    return fitting


def bounded(batch: TokenBatch, max_tokens: int) -> TokenBatch:
    """Whole sequences of a batch while they fit, without columns that only hold padding.

    Raises:
        TrainerError: the first sequence alone is too long.
    """
    chosen = batch.rows(sample_rows(batch.lengths, max_tokens))
    width = int(chosen.lengths.max())
    return TokenBatch(chosen.tokens[:, :width], chosen.response_mask[:, :width])
