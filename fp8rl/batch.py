"""A batch of token sequences: what rollout hands to the trainer, and warm-up too.

Sequences are padded on the right. Everything per token (log-probabilities, advantages, masks) is
[B, S] and aligned with ``tokens``: entry [b, t] belongs to the token at t, given those before it.
Left out: packing, and more than one turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from fp8rl.errors import BatchError


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their responses: ``tokens`` int64 [B, S], ``response_mask`` bool [B, S].

    The mask is True where the policy generated the token; never at position 0, and at least once
    in a row. What stands behind a row's last generated token is padding.

    Raises:
        BatchError: shapes or dtypes do not fit, a first token is marked, a row has no response.
    """

    tokens: Int64[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        tokens, mask = self.tokens, self.response_mask
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise BatchError(
                f"tokens must be int64 [batch, time], not empty; "
                f"found {tokens.dtype} {list(tokens.shape)}"
            )
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            raise BatchError(
                f"response_mask must be bool {list(tokens.shape)} as tokens are; "
                f"found {mask.dtype} {list(mask.shape)}"
            )
        if bool(mask[:, 0].any()):
            raise BatchError("response_mask marks a first token, which no context predicts")
        if not bool(mask.any(dim=1).all()):
            rows = (~mask.any(dim=1)).nonzero().flatten().tolist()
            raise BatchError(f"rows {rows[:8]} hold no generated token; leave them out")

    @property
    def lengths(self) -> Int64[Tensor, " batch"]:
        """Real tokens of each row, prompt and response: up to the last generated one."""
        positions = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        return (positions * self.response_mask).amax(dim=1)

    @property
    def real(self) -> Bool[Tensor, "batch time"]:
        """True at every real token, False at padding."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions < self.lengths[:, None]

    def rows(self, index: slice | Int64[Tensor, " rows"]) -> TokenBatch:
        """Select rows, by slice or by index; the width stays."""
        return TokenBatch(self.tokens[index], self.response_mask[index])
