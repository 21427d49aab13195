"""Log-probs of given tokens from logits or hidden states, without a wide copy of the logits.

    log p(y) = (x_y - m) - log sum_v exp(x_v - m),   x = logits / temperature,   m = max x
    d log p(y) / d logits_v = ([v = y] - p_v) / temperature
    H = - sum_v p_v log p_v                                                  entropy, in nats

in fp32 or wider. `torch.log_softmax(logits.float(), -1)` holds [tokens, vocabulary] in fp32, twice
with its gradient: 5 GB each for 8192 tokens and a vocabulary of 151936. Here forward and backward
run over chunks of tokens, and the backward pass takes the softmax again instead of keeping it.

    log_probs_from_logits    logits and their gradient exist, in their own dtype; the vocabulary
                             may be sharded over ranks
    log_probs_from_hidden    they exist for a block of tokens alone: the head is applied block by
                             block too, once more in the backward pass

The temperature has to be the one the rollout sampled with, or the importance ratio is off. An id
outside the vocabulary has a log-prob of NaN: at padding nobody reads it, elsewhere the losses
refuse it. Leaves out: softcapping, a head with a bias or sharded, gradients of the entropy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fp8rl.correction.chunked_softmax import (
    chunks,
    empty_sums,
    join,
    logits_gradient,
    place,
    reduce_logits,
)
from fp8rl.correction.errors import ShapeError, ValueRangeError

# Logits at a time between two products with the head, in their own dtype.
HEAD_BLOCK = 2**26
# Elements at a time of the head's gradient, in the head's dtype, before they join the fp32 sum.
HEAD_GRADIENT_CHUNK = 2**22


class TokenScores(NamedTuple):
    """What a policy thinks of tokens; fp32, or fp64 for fp64 logits.

    Attributes:
        logprobs: log p(token), nats, with gradient.
        entropy: of the distribution each token was drawn from, nats, without gradient; None
            unless asked for.
    """

    logprobs: Float[Tensor, "*tokens"]
    entropy: Float[Tensor, "*tokens"] | None


def log_probs_from_logits(
    logits: Float[Tensor, "*tokens vocabulary"],
    tokens: Int[Tensor, "*tokens"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
) -> TokenScores:
    """Score `tokens` under `logits`, whose gradient comes in their own dtype.

    A position whose log-prob gets a gradient of 0 passes on 0, whatever stands there, NaN too.

    Args:
        logits: [..., vocabulary] of any strides; row t is what token t was drawn from.
        tokens: int64 [...], ids within the whole vocabulary.
        temperature: the logits are divided by it.
        entropy: whether to measure entropies too.
        group: ranks that hold equal parts of the vocabulary, in their order; every one of them
            calls, and gets the same result. None: `logits` are of the whole vocabulary.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        ValueRangeError: the temperature is not a positive number.
    """
    _check("logits", logits, tokens, temperature)
    shape = tokens.shape
    if logits.is_contiguous():  # one long run of tokens makes even chunks
        logits, tokens = logits.view(-1, logits.shape[-1]), tokens.reshape(-1)
    logprobs, entropies = _FromLogits.apply(  # type: ignore[no-untyped-call]
        logits, tokens, temperature, entropy, group
    )
    return TokenScores(logprobs.view(shape), entropies.view(shape) if entropy else None)


def log_probs_from_hidden(
    hidden: Float[Tensor, "*tokens width"],
    head: Float[Tensor, "vocabulary width"],
    tokens: Int[Tensor, "*tokens"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenScores:
    """Score `tokens` under the logits `hidden @ head.T`, of which only blocks ever exist.

    Gradients reach `hidden` and `head`, each in its dtype; the head's is added up in fp32. A
    position whose log-prob gets a gradient of 0 passes on 0.

    Args:
        hidden: what the head is applied to, [..., width]; row t is what token t was drawn from.
        head: weight of the output layer, [vocabulary, width], of the same dtype.
        tokens: int64 [...], ids within the vocabulary.
        temperature: the logits are divided by it.
        entropy: whether to measure entropies too.

    Raises:
        ShapeError, ValueRangeError: as for `log_probs_from_logits`.
    """
    if torch.is_autocast_enabled(hidden.device.type):  # backward has to see the forward's logits
        narrow = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(narrow), head.to(narrow)
    if head.ndim != 2 or hidden.shape[-1:] != head.shape[-1:] or hidden.dtype != head.dtype:
        raise ShapeError(
            f"head: {head.dtype} {list(head.shape)}, expected {hidden.dtype} [vocabulary, width] "
            f"for hidden {list(hidden.shape)}"
        )
    _check("hidden", hidden, tokens, temperature)
    shape = tokens.shape
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs, entropies = _FromHidden.apply(  # type: ignore[no-untyped-call]
        flat, head, tokens.reshape(-1), temperature, entropy
    )
    return TokenScores(logprobs.view(shape), entropies.view(shape) if entropy else None)


def _check(name: str, x: Tensor, tokens: Tensor, temperature: float) -> None:
    if x.ndim < 2 or x.shape[:-1] != tokens.shape or not x.is_floating_point():
        raise ShapeError(
            f"{name}: {x.dtype} {list(x.shape)}, expected floats of the tokens' shape "
            f"{list(tokens.shape)} and one dimension more"
        )
    if tokens.dtype != torch.int64:
        raise ShapeError(f"tokens: dtype {tokens.dtype}, expected torch.int64")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueRangeError(f"temperature: {temperature}, expected a positive number")


class _FromLogits(torch.autograd.Function):
    """[..., vocabulary] and [...] to log-probs and entropies [...]; no entropies: empty."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        temperature: float,
        entropy: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        if group is not None:
            tokens = tokens - group.rank() * logits.shape[-1]
        sums = empty_sums(logits, tokens, entropy)
        reduce_logits(logits, tokens, temperature, sums)
        logprobs, entropies = join(sums, place(tokens, logits.shape[-1])[1], group)
        ctx.save_for_backward(logits, tokens, sums[:2])
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, norm = ctx.saved_tensors
        result = torch.empty_like(logits)
        logits_gradient(logits, tokens, ctx.temperature, norm, gradient, out=result)
        return result, None, None, None, None


class _FromHidden(torch.autograd.Function):
    """hidden [tokens, width], head [vocabulary, width] and tokens [tokens], as `_FromLogits`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        sums = empty_sums(hidden, tokens, entropy)
        for at in chunks(tokens.shape, len(head), HEAD_BLOCK):
            reduce_logits(linear(hidden[at], head), tokens[at], temperature, sums[:, *at])
        logprobs, entropies = join(sums, place(tokens, len(head))[1], None)
        ctx.save_for_backward(hidden, head, tokens, sums[:2])
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, tokens, norm = ctx.saved_tensors
        of_hidden, of_head = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        wide = torch.promote_types(head.dtype, torch.float32)
        head_gradient = torch.zeros_like(head, dtype=wide) if of_head else None
        for at in chunks(tokens.shape, len(head), HEAD_BLOCK):
            logits = linear(hidden[at], head)
            logits_gradient(
                logits, tokens[at], ctx.temperature, norm[:, *at], gradient[at], out=logits
            )
            if hidden_gradient is not None:
                torch.mm(logits, head, out=hidden_gradient[at])
            if head_gradient is not None:
                # a NaN in a row without gradient must not meet the product: 0 * NaN is NaN
                rows = hidden[at].masked_fill(gradient[at][:, None] == 0, 0.0)
                _add_product(head_gradient, logits, rows)
            del logits  # or the next block would be made beside it
        total = None if head_gradient is None else head_gradient.to(head.dtype)
        return hidden_gradient, total, None, None, None


def _add_product(total: Tensor, logits: Tensor, rows: Tensor) -> None:
    """Add logits.T @ rows to the wide `total` [vocabulary, width], in pieces of the vocabulary."""
    step = max(1, HEAD_GRADIENT_CHUNK // rows.shape[-1])
    for start in range(0, len(total), step):
        total[start : start + step] += logits[:, start : start + step].T @ rows
