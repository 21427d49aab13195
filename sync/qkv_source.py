"""Where q, k and v come from: one interface to trainers of any kind, and to the live engine.

    with source.watch(observer) as watch, torch.no_grad():
        watch.token_mask = mask             # before each forward, where sequences are padded
        model(tokens)
    seen = observer.observation().reduced()

The counterpart of ``WeightSource``. q and k are seen after QK-norm and RoPE, as they enter the
cache; key and value heads before they are repeated for grouped queries. Each rank shows the layers,
heads and tokens that it has; ``KVObservation.reduced`` joins them.

Only forwards without gradients are watched: those of a training step belong to the weights before
it, and activation checkpointing would show every token twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fp8rl.quant import AttentionShape, KVObserver, KVScaleError


@dataclass
class QKVWatch:
    """What the caller says of the forward to come.

    token_mask: bool [batch, time], True at real tokens; None where all are real. paused: whether
    forwards go unobserved. Both hold until they are set again.
    """

    token_mask: Tensor | None = None
    paused: bool = False


@runtime_checkable
class QKVSource(Protocol):
    """A model whose q, k and v can be observed. ``shape`` is that of the whole model."""

    shape: AttentionShape

    def watch(self, observer: KVObserver) -> AbstractContextManager[QKVWatch]:
        """Feed ``observer`` with every forward inside the block; nothing is left behind after it.

        Raises KVScaleError, from the forward itself: it keeps gradients, reads a cache of earlier
        tokens, or has a mask that does not fit.
        """
        ...


@contextmanager
def shown(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call each hook before each forward of its module, and before hooks that change its input."""
    with ExitStack() as stack:
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def check_forward(layer: int, queries: int, keys: int) -> None:
    """Refuse a forward that would be observed wrongly, by what it is and what to do instead."""
    if torch.is_grad_enabled():
        raise KVScaleError(
            f"layer {layer}: this forward keeps gradients, and may be computed again in the "
            "backward pass; watch a forward of its own under torch.no_grad()"
        )
    if queries != keys:
        raise KVScaleError(
            f"layer {layer}: {queries} queries meet {keys} keys, so the forward reads a cache of "
            "tokens already seen; run whole sequences without a cache (use_cache=False)"
        )


def padding_mask(
    mask: Tensor | None, layer: int, batch: int, time: int, device: torch.device
) -> Bool[Tensor, "batch time"] | None:
    """Return the caller's ``token_mask``, on ``device``, if it is bool [batch, time]."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, time):
        raise KVScaleError(
            f"layer {layer}: token_mask is {mask.dtype} {list(mask.shape)}, but the forward has "
            f"{[batch, time]} tokens; it must be bool [batch, time], True at real tokens"
        )
    return mask.to(device)
