"""Which rows of a forward of vLLM's model are which sequence, inside its worker.

Sequences lie one behind the other, and each begins at position 0; the model's own inputs say where.
A sequence that does not begin there was cut (chunked prefill) or had a prefix in the cache: its
rows are found under other tokens than its own, so that whoever asks for it whole finds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from vllm.forward_context import get_forward_context

_INPUTS: Final = ("input_ids", "positions")  # of a model's forward, in vLLM's order


class Rows(NamedTuple):
    """A sequence in a forward: its rows, and its tokens."""

    rows: slice
    tokens: tuple[int, ...]


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Rows]:
    """The sequences of a forward that a model is called for; none in profiling and warm-up."""
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return []
    given = {**dict(zip(_INPUTS, args, strict=False)), **kwargs}
    real = next(iter(metadata.values())).num_actual_tokens
    tokens, positions = (given[name][:real].tolist() for name in _INPUTS)
    starts = [row for row, position in enumerate(positions) if position == 0]
    ends = [*starts[1:], real]
    return [Rows(slice(a, b), tuple(tokens[a:b])) for a, b in zip(starts, ends, strict=True)]
