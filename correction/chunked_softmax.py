"""Softmax sums of logits, chunk by chunk of tokens, and joined over ranks that share a vocabulary.

With x the scaled logits of a token in fp32 or wider, and y the token, `sums` [3 or 4, ...] holds

    m = max x      s = sum exp(x - m)      t = x_y - m      e = sum exp(x - m) (x - m)

    log p(y) = t - log s          p_v = exp(x_v - m) / s          H = log s - e / s

What is as wide as the vocabulary exists for a chunk alone. Leaves out what the scores are for:
`logprobs.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Logits at a time, in fp32: on a CPU what its caches hold, elsewhere what a launch is worth.
CPU_CHUNK, DEVICE_CHUNK = 2**20, 2**26
# Stands for -inf where that would meet another -inf or a 0.
LOWEST = -1e30


def empty_sums(
    x: Float[Tensor, ...], tokens: Int[Tensor, "*tokens"], entropy: bool
) -> Float[Tensor, "sums ..."]:
    """Room for the sums of logits of the dtype of `x`; with entropies four, else three."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(4 if entropy else 3, *tokens.shape, dtype=wide, device=x.device)


def reduce_logits(
    logits: Float[Tensor, "*tokens vocabulary"],
    tokens: Int[Tensor, "*tokens"],
    temperature: float,
    sums: Float[Tensor, "sums ..."],
) -> None:
    """Write the sums of these logits; where a token is not in this vocabulary, its t is any."""
    highest, total, target, *weighted = sums
    for at in chunks(tokens.shape, logits.shape[-1], _chunk(logits)):
        each = _scaled(logits[at], temperature)
        highest[at] = each.amax(-1).clamp_(min=LOWEST)
        each = each - highest[at].unsqueeze(-1)
        index = place(tokens[at], logits.shape[-1])[0].unsqueeze(-1)
        target[at] = each.gather(-1, index).squeeze(-1)
        powers = each.exp()
        total[at] = powers.sum(-1)
        for sum_ in weighted:
            sum_[at] = powers.mul_(each.clamp_(min=LOWEST)).sum(-1)


def join(
    sums: Float[Tensor, "sums ..."],
    mine: Bool[Tensor, "*tokens"],
    group: dist.ProcessGroup | None,
) -> tuple[Float[Tensor, "*tokens"], Float[Tensor, ...]]:
    """Log-probs and entropies from `sums`, which become those of all ranks of `group`.

    Args:
        sums: of this rank's part of the vocabulary; changed.
        mine: whether a token is in that part. One that is in nobody's gets NaN.
        group: the ranks, or None for this one alone.
    """
    highest, total, target, *weighted = sums
    owners = mine.to(sums.dtype)
    if group is not None:
        shift = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        shift -= highest
        for sum_ in weighted:
            sum_.add_(total * shift).mul_(shift.exp())
        total.mul_(shift.exp())
        target.copy_(torch.where(mine, target + shift, 0.0))
        added = torch.cat([sums[1:], owners[None]])
        dist.all_reduce(added, group=group)
        sums[1:], owners = added[:-1], added[-1]
    normalizer = total.log()
    logprobs = (target - normalizer).masked_fill_(owners == 0, math.nan)
    return logprobs, normalizer - weighted[0] / total if weighted else total.new_empty(0)


def logits_gradient(
    logits: Float[Tensor, "*tokens vocabulary"],
    tokens: Int[Tensor, "*tokens"],
    temperature: float,
    norm: Float[Tensor, "2 ..."],
    gradient: Float[Tensor, "*tokens"],
    out: Float[Tensor, "*tokens vocabulary"],
) -> None:
    """Write the logits' gradient to `out`, which may be `logits`; `norm` is m and s, joined."""
    highest, total = norm
    for at in chunks(tokens.shape, logits.shape[-1], _chunk(logits)):
        each = (_scaled(logits[at], temperature) - highest[at].unsqueeze(-1)).exp_()
        passed = gradient[at] / temperature
        each.mul_((-passed / total[at]).unsqueeze(-1))
        index, mine = place(tokens[at], logits.shape[-1])
        each.scatter_add_(-1, index.unsqueeze(-1), torch.where(mine, passed, 0.0).unsqueeze(-1))
        out[at] = each.masked_fill_(passed.unsqueeze(-1) == 0, 0.0)


def place(
    tokens: Int[Tensor, "*tokens"], vocabulary: int
) -> tuple[Int[Tensor, "*tokens"], Bool[Tensor, "*tokens"]]:
    """Where in this part of the vocabulary each token stands, and whether it does."""
    index = tokens.clamp(0, vocabulary - 1)
    return index, index == tokens


def chunks(shape: torch.Size, vocabulary: int, elements: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut tokens [..., n] into runs along n of about `elements` logits."""
    step = max(1, elements // vocabulary)
    runs = [slice(start, start + step) for start in range(0, shape[-1], step)]
    yield from itertools.product(*(range(n) for n in shape[:-1]), runs)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """In fp32 or wider and divided by the temperature; may be the logits themselves."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _chunk(logits: Tensor) -> int:
    return CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
