"""What one trainer rank holds of one Hugging Face tensor, however the trainer cut it.

A sharded source is a description: which box of which tensor lies on this rank, and how to read it
there. Moving, quantizing and joining are the same for every trainer (``sharded_source.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fp8rl.quant import QuantizedTensor
from fp8rl.quant.shard_layout import Box


@dataclass(frozen=True, eq=False)
class LocalShard:
    """This rank's part of a tensor.

    name: the Hugging Face name. box: where the part lies in the whole tensor, in elements.
    read: gives the part as it is now, with the shape of the box: a view of the parameter, or a copy
        where the trainer's layout is another; or a ``QuantizedTensor`` of the box, where the
        trainer's own weights are blockwise FP8. Called once in each pass, never kept.

    A tensor of which several ranks hold the same part (data parallelism, replicated norms) is
    described by one of them.
    """

    name: str
    box: Box
    read: Callable[[], Tensor | QuantizedTensor]
