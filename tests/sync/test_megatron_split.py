"""How Megatron cuts parameters over ranks: against the cut done with whole tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8rl.sync.megatron_split import (
    COLUMNS,
    GATE_UP,
    QKV,
    ROWS,
    ROWS_OR_WHOLE,
    VOCABULARY,
    WHOLE,
    Split,
)

HEAD = 2


def numbered(*shapes: tuple[int, int]) -> list[Tensor]:
    """Tensors no two elements of which are alike."""
    ends = torch.tensor([a * b for a, b in shapes]).cumsum(0).tolist()
    return [
        torch.arange(end - a * b, end).view(a, b) for end, (a, b) in zip(ends, shapes, strict=True)
    ]


def put_together(
    split: Split, tensors: list[Tensor], ranks: list[Tensor], head: int = HEAD
) -> list[Tensor]:
    """The tensors again, from what the ranks hold; every element from one rank."""
    dim = split.dim
    lengths = [t.shape[dim] for t in tensors]
    found = [torch.full_like(t, -1) for t in tensors]
    for rank, part in enumerate(ranks):
        pieces = split.pieces(lengths, part.shape[dim], rank, len(ranks), head)
        assert pieces is not None
        for piece in pieces:
            runs = [part.narrow(dim, first, size) for first, size in piece.runs]
            place = found[piece.tensor].narrow(dim, piece.start, piece.size)
            assert bool((place == -1).all())
            place.copy_(torch.cat(runs, dim))
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5))
def test_rows_and_columns_are_consecutive(ranks: int, each: int, other: int) -> None:
    rows, columns = numbered((ranks * each, other), (other, ranks * each))
    assert_equal(put_together(ROWS, [rows], list(rows.chunk(ranks))), [rows])
    assert_equal(put_together(COLUMNS, [columns], list(columns.chunk(ranks, 1))), [columns])


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_rank_holds_its_gate_rows_and_then_its_up_rows(ranks: int, each: int) -> None:
    gate, up = numbered((ranks * each, 3), (ranks * each, 3))
    parts = [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    assert_equal(put_together(GATE_UP, [gate, up], parts), [gate, up])


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_query_groups_are_cut_anywhere_that_parts_are_equal(
    groups: int, per_group: int, data: st.DataObject
) -> None:
    q, k, v = numbered(*((n * groups * HEAD, 3) for n in (per_group, 1, 1)))
    grouped = [x.view(groups, -1, HEAD, 3) for x in (q, k, v)]
    whole = torch.cat(grouped, dim=1).flatten(0, 2)
    divisors = [n for n in range(1, len(whole) + 1) if len(whole) % n == 0]
    ranks = data.draw(st.sampled_from(divisors))
    assert_equal(put_together(QKV, [q, k, v], list(whole.chunk(ranks))), [q, k, v])


@given(st.integers(1, 8), st.integers(1, 5), st.data())
def test_the_padding_of_a_vocabulary_is_nothing(ranks: int, each: int, data: st.DataObject) -> None:
    (padded,) = numbered((ranks * each, 3))
    vocabulary = padded[: data.draw(st.integers(1, ranks * each))]
    assert_equal(put_together(VOCABULARY, [vocabulary], list(padded.chunk(ranks))), [vocabulary])


@given(st.integers(1, 8), st.integers(2, 8))
def test_what_is_not_cut_is_whole_on_every_rank(length: int, ranks: int) -> None:
    for split in (WHOLE, ROWS_OR_WHOLE):
        assert split.parts([length], length, ranks) == 1
        for rank in range(ranks):
            (piece,) = split.pieces([length], length, rank, ranks, HEAD) or ()
            assert (piece.start, piece.runs) == (0, ((0, length),))
    assert ROWS_OR_WHOLE.parts([length * ranks], length, ranks) == ranks


@pytest.mark.parametrize(
    ("split", "lengths", "length", "ranks"),
    [
        (ROWS, [8], 3, 2),
        (ROWS, [8], 8, 2),
        (WHOLE, [8], 4, 2),
        (ROWS_OR_WHOLE, [8], 3, 2),
        (VOCABULARY, [9], 4, 2),
        (GATE_UP, [8, 6], 7, 2),
        (GATE_UP, [9, 9], 9, 2),
        (QKV, [8, 4, 2], 7, 2),
    ],
)
def test_a_part_of_another_length_does_not_fit(
    split: Split, lengths: list[int], length: int, ranks: int
) -> None:
    assert split.pieces(lengths, length, 0, ranks, HEAD) is None
