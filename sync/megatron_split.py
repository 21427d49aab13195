"""How megatron-core cuts a parameter over tensor-parallel ranks, and what one rank's part holds.

Put together over its R ranks along `dim`, a parameter is a sequence of runs of Hugging Face
tensors; rank r holds the r-th of R equal parts of it:

    ROWS, COLUMNS    the tensor itself
    VOCABULARY       the rows of the tensor, then padding
    GATE_UP          for each rank its gate rows, then its up rows
    QKV              for each kv head its query heads, then k, then v; with more ranks than kv heads
                     a rank holds a piece of a group, cut wherever R parts are equal
    WHOLE            not cut: every rank holds all
    ROWS_OR_WHOLE    MLA's down projections: rows in local layers, whole in Transformer Engine's

Source: megatron-core 0.16.1, transformer/attention.py (`get_query_key_value_tensors`), mlp.py and
moe/experts.py (`sharded_state_dict`), tensor_parallel/layers.py, multi_latent_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple


class Run(NamedTuple):
    """`size` rows (or columns) of tensor number `tensor`, from `start` on."""

    tensor: int
    start: int
    size: int


class Piece(NamedTuple):
    """What a part holds of one tensor: from `start` on, the runs (first, size) of the part."""

    tensor: int
    start: int
    runs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Rows (or columns) of the tensor."""
        return sum(size for _, size in self.runs)


Order = Callable[[Sequence[int], int, int], list[Run]]
"""(lengths of the tensors along `dim`, ranks, head size) -> the whole parameter as runs."""


def _one(lengths: Sequence[int], ranks: int, head: int) -> list[Run]:
    return [Run(0, 0, lengths[0])]


def _gate_up(lengths: Sequence[int], ranks: int, head: int) -> list[Run]:
    each = lengths[0] // ranks
    return [Run(tensor, rank * each, each) for rank in range(ranks) for tensor in (0, 1)]


def _grouped(lengths: Sequence[int], ranks: int, head: int) -> list[Run]:
    sizes = (lengths[0] * head // lengths[1], head, head)  # q, k and v rows of a kv head
    groups = range(lengths[1] // head)
    return [
        Run(tensor, group * size, size) for group in groups for tensor, size in enumerate(sizes)
    ]


@dataclass(frozen=True)
class Split:
    """One way to cut. cut: whether it is cut; "maybe": its length tells. padded: see VOCABULARY."""

    dim: Literal[0, 1]
    order: Order = _one
    cut: Literal["always", "never", "maybe"] = "always"
    padded: bool = False

    def parts(self, lengths: Sequence[int], length: int, ranks: int) -> int:
        """Return how many parts there are: `ranks`, or 1 where every rank holds the whole."""
        whole = self.cut == "never" or (self.cut == "maybe" and length == sum(lengths))
        return 1 if whole else ranks

    def pieces(
        self, lengths: Sequence[int], length: int, rank: int, ranks: int, head: int
    ) -> list[Piece] | None:
        """Find what a rank's part holds, one piece of a tensor at most; None if it does not fit.

        lengths: of the tensors along `dim`. length: of the part. head: rows of one head.
        """
        parts = self.parts(lengths, length, ranks)
        runs = self.order(lengths, parts, head)
        filled = sum(run.size for run in runs)
        room = length * parts
        if filled != sum(lengths) or filled > room or (filled < room and not self.padded):
            return None
        begin = rank * length if parts > 1 else 0
        found: dict[int, list[tuple[int, int, int]]] = {}
        position = 0
        for tensor, start, size in runs:
            low, high = max(position, begin), min(position + size, begin + length)
            if low < high:
                here = (start + low - position, low - begin, high - low)
                found.setdefault(tensor, []).append(here)
            position += size
        return [
            Piece(tensor, held[0][0], tuple((first, size) for _, first, size in held))
            for tensor, held in found.items()
        ]


ROWS: Final = Split(0)
COLUMNS: Final = Split(1)
WHOLE: Final = Split(0, cut="never")
ROWS_OR_WHOLE: Final = Split(0, cut="maybe")
VOCABULARY: Final = Split(0, padded=True)
GATE_UP: Final = Split(0, _gate_up)
QKV: Final = Split(0, _grouped)
