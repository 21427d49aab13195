"""Shards quantized by real Gloo ranks and joined are the whole, bit for bit; mistakes reach all."""

import json
import re
import subprocess
import sys
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fp8rl.quant import QuantizedTensor, quantize_blockwise
from fp8rl.quant.errors import ShardError
from fp8rl.quant.shard_layout import Box, ShardLayout, shared_blocks
from fp8rl.quant.sharded import QuantizedShard, WeightShard, join_shards, quantize_shards

from . import shard_ranks
from .shard_ranks import CASES, PAIR, PAIR_CASE, RANKS, Case

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four real ranks wrote, started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    ran = subprocess.run(
        [sys.executable, shard_ranks.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def tensors(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{rank}.safetensors") for rank in range(RANKS)]


def read(tensors: dict[str, torch.Tensor], name: str, case: Case, rank: int) -> QuantizedShard:
    return QuantizedShard(
        name,
        case.layout.shape,
        case.layout.boxes[rank],
        tensors[f"{name}.data"],
        tensors[f"{name}.scale_inv"],
        case.options.get("block_size", (128, 128)),
        case.options.get("scale_format", "pow2"),
    )


def assert_same(found: QuantizedTensor, want: QuantizedTensor) -> None:
    assert torch.equal(found.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(found.scale_inv, want.scale_inv)
    assert (found.block_size, found.scale_format) == (want.block_size, want.scale_format)


@pytest.mark.parametrize("name", CASES)
def test_parts_quantized_by_ranks_join_to_the_whole(tensors, name):
    case = CASES[name]
    parts = [read(found, name, case, rank) for rank, found in enumerate(tensors)]
    want = quantize_blockwise(shard_ranks.whole(name, case), **case.options)
    assert_same(join_shards(parts), want)
    assert_same(join_shards(parts[::-1]), want)


def test_a_group_of_some_ranks_needs_the_others_not(tensors):
    parts = [read(tensors[rank], "pair", PAIR_CASE, place) for place, rank in enumerate(PAIR)]
    assert_same(join_shards(parts), quantize_blockwise(shard_ranks.whole("pair", PAIR_CASE)))


def test_a_linear_that_fsdp2_has_sharded(tensors):
    case = Case(ShardLayout.chunk(shard_ranks.FSDP_SHAPE, 0, RANKS))
    parts = [read(found, "fsdp", case, rank) for rank, found in enumerate(tensors)]
    assert_same(join_shards(parts), quantize_blockwise(shard_ranks.fsdp_weight(), fp32_as="export"))


def test_random_cuts_sizes_and_formats(answers):
    assert [rank["wrong"] for rank in answers] == [[]] * RANKS


def test_sticky_parts_join_to_the_sticky_whole(answers):
    assert len(shard_ranks.sticky_names()) > 10
    assert [rank["wrong_sticky"] for rank in answers] == [[]] * RANKS


def test_ranks_with_other_previous_scales_of_a_block_decide_alike(tensors):
    """`join_shards` refuses parts that have other scales for a block that they share."""
    case = CASES["rows, cut anywhere"]
    parts = [read(found, "ranks that differ", case, rank) for rank, found in enumerate(tensors)]
    assert join_shards(parts).shape == case.layout.shape


def shared_of(case: Case) -> int:
    """Count the blocks that two or more ranks hold, element by element."""
    *_, n, k = case.layout.shape
    bn, bk = case.options.get("block_size", (128, 128))
    owner = torch.zeros(case.layout.shape, dtype=torch.int64)
    for rank, box in enumerate(case.layout.boxes):
        owner[box.slices] = 1 << rank
    owners = owner.reshape(prod(case.layout.shape[:-2]), n, k)
    blocks = [
        owners[e, i : i + bn, j : j + bk]
        for e in range(len(owners))
        for i in range(0, n, bn)
        for j in range(0, k, bk)
    ]
    return sum(len(block.unique()) > 1 for block in blocks)


@pytest.mark.parametrize("name", CASES)
def test_ranks_exchange_four_bytes_for_each_shared_block_and_no_weight(answers, name):
    shared = shared_of(CASES[name])
    want = [24, 4 * shared] if shared else [24]
    assert [rank["traffic"][name] for rank in answers] == [want] * RANKS


def answers_to(answers: Answers, mistake: str) -> list[str]:
    return [rank["refusals"][mistake] for rank in answers]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("nan inside", r"b: 1 non-finite element\(s\), the first at index \[160, 250\] \(nan\)"),
        ("nan shared", r"a: 1 non-finite element\(s\), the first at index \[151, 3\] \(nan\)"),
        ("many infs", r"a: 3 non-finite element\(s\), the first at index \[77, 2\] \(-inf\)"),
    ],
)
def test_a_non_finite_value_on_one_rank_is_the_error_of_the_whole_on_every_rank(
    answers, mistake, message
):
    found = answers_to(answers, mistake)
    assert len(set(found)) == 1
    assert re.match(f"NonFiniteWeightError: {message}", found[0])


@pytest.mark.parametrize(
    ("mistake", "first", "where", "second"),
    [
        ("other format", "scale_format=pow2", 1, "scale_format=fp32"),
        ("other order", "'a: torch.bfloat16", 2, "'b: torch.bfloat16"),
        ("one fewer", "'b: torch.bfloat16", 3, "'nothing more'"),
        ("none", "'a: torch.bfloat16", 3, "'nothing more'"),
        ("other layout", r"2: \[70, 257\] at \[152, 0\]", 1, r"2: \[76, 257\] at \[152, 0\]"),
        ("single", "fp32_as=None", 1, "fp32_as=master"),
        ("some sticky", "torch.bfloat16 .301", 3, "torch.bfloat16 with previous scales "),
    ],
)
def test_ranks_that_mean_different_things_are_all_told_what(answers, mistake, first, where, second):
    found = answers_to(answers, mistake)
    assert len(set(found)) == 1
    assert re.match(
        f"ShardError: ranks differ .*{first}.* where rank {where} has.*{second}", *found[:1]
    )


@pytest.mark.parametrize(
    ("mistake", "where", "error"),
    [
        ("unknown format", 1, "QuantFormatError: scale_format must be one of"),
        ("wide", 2, "QuantFormatError: a: dtype must be one of"),
        ("unsaid", 1, "QuantFormatError: a: is fp32, and fp32_as is None"),
        (
            "odd previous",
            2,
            r"QuantFormatError: a: previous scales .*\(1, 1\).* expected .*\(1, 3\)",
        ),
        ("cut", 2, r"ShardError: a: rank 2 of the group holds \(75, 257\), and \(76, 257\) of"),
    ],
)
def test_a_mistake_on_one_rank_is_told_to_all(answers, mistake, where, error):
    found = answers_to(answers, mistake)
    assert re.match(error, found[where])
    message = found[where].split(": ", 1)[1]
    others = {answer for rank, answer in enumerate(found) if rank != where}
    assert others == {f"ShardError: rank {where} of the group cannot quantize its part: {message}"}


def test_a_layout_of_other_ranks_and_a_group_of_others_are_refused(answers):
    for answer in answers_to(answers, "three parts"):
        assert answer.startswith("ShardError: a: its layout has 3 parts and the group 4 ranks")
    outside = [answers[r]["refusals"]["outsider"] for r in range(RANKS) if r not in PAIR]
    assert all("this process is not in the group" in answer for answer in outside)


def test_without_a_process_group_the_error_says_what_to_call():
    whole = ShardLayout.chunk((4, 4), 0, 1)
    with pytest.raises(ShardError, match="init_process_group first, or quantize_blockwise"):
        quantize_shards([WeightShard("w", torch.zeros(4, 4), whole)])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ShardLayout, tuple[int, int]]:
    """A grid of cuts through a weight of any size, some ranks with nothing; and a block size."""
    shape = draw(st.lists(st.integers(0, 20), min_size=2, max_size=3).map(tuple))
    sides = []
    for size in shape:
        cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
        sides.append(list(zip([0, *cuts], [*cuts, size], strict=True)))
    cells = [()]
    for side in sides:
        cells = [(*cell, span) for cell in cells for span in side]
    boxes = [Box(tuple(a for a, _ in c), tuple(b - a for a, b in c)) for c in cells]
    block_size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return ShardLayout(shape, tuple(draw(st.permutations(boxes)))), block_size


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_pieces_and_shared_blocks_are_those_counted_element_by_element(case):
    layout, block_size = case
    sizes = (*(1,) * (len(layout.shape) - 2), *block_size)
    grid = tuple(ceil(n / b) for n, b in zip(layout.shape, sizes, strict=True))
    holders = np.zeros((len(layout.boxes), *grid), dtype=bool)
    for rank, box in enumerate(layout.boxes):
        for index in np.ndindex(*box.shape):
            element = np.add(box.offset, index)
            holders[rank][tuple(element // sizes)] = True
    shared = holders.sum(axis=0) > 1
    numbers = {tuple(i): n for n, i in enumerate(np.argwhere(shared))}
    for rank, box in enumerate(layout.boxes):
        blocks = box.blocks(block_size)
        touched = np.zeros(grid, dtype=bool)
        touched[blocks.slices] = True
        assert np.array_equal(touched, holders[rank])

        elements = np.zeros(box.shape, dtype=int)
        for piece in layout.pieces(rank, block_size):
            elements[piece.at] += 1
            of_piece = shared[blocks.slices][piece.blocks]
            assert of_piece.size and (of_piece == piece.shared).all()
        assert (elements == 1).all()

        count, cells, slots = shared_blocks(layout, block_size, rank, torch.device("cpu"))
        assert count == shared.sum()
        found = np.argwhere(np.ones(blocks.shape, dtype=bool))[cells.numpy()] + blocks.offset
        assert [numbers[tuple(i)] for i in found] == slots.tolist()
        assert len(found) == (shared & holders[rank]).sum()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_chunks_are_those_of_torch(size, ranks):
    parts = torch.arange(size).chunk(ranks)
    want = [len(p) for p in parts] + [0] * (ranks - len(parts))
    found = ShardLayout.chunk((size, 3), 0, ranks)
    assert [box.shape[0] for box in found.boxes] == want
    assert ShardLayout.chunk((3, size), -1, ranks).boxes[0].shape == (3, want[0])


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4, 6), [((0, 0), (2, 6)), ((3, 0), (1, 6))], r"gap.*from \(2, 0\) to \(3, 6\)"),
        ((4, 6), [((0, 0), (3, 6)), ((2, 0), (2, 6))], r"overlap: parts \[0, 1\].*\(2, 0\)"),
        ((4, 6), [((0, 0), (4, 6)), ((0, 0), (4, 6))], r"overlap: parts \[0, 1\]"),
        ((4, 6), [((0, 0), (5, 6))], r"part 0: offset \(0, 0\) and shape \(5, 6\) do not lie"),
        ((4, 6), [((-1, 0), (5, 6))], "do not lie in a weight of"),
        ((4, 6), [((0,), (4,))], "do not lie in a weight of"),
        ((4, 6), [], "gap"),
        ((4,), [((0,), (4,))], r"must be \[N, K\] or \[E, N, K\], found \(4,\)"),
    ],
)
def test_parts_that_do_not_tile_the_weight_are_refused(shape, boxes, message):
    with pytest.raises(ShardError, match=message):
        ShardLayout(shape, tuple(Box(*box) for box in boxes))


def parts_of(x: torch.Tensor, cut: int) -> list[QuantizedShard]:
    """Two parts of rows, each with the scales of the whole."""
    q = quantize_blockwise(x)
    return [
        QuantizedShard(
            *("w", q.shape, box, q.data[box.slices]),
            q.scale_inv[box.blocks(q.block_size).slices],
            *(q.block_size, q.scale_format),
        )
        for box in ShardLayout.split(q.shape, 0, [cut, len(x) - cut]).boxes
    ]


def test_joining_what_does_not_belong_together_is_refused():
    x = torch.randn(200, 130).bfloat16()
    first, second = parts_of(x, 150)
    assert_same(join_shards([second, first]), quantize_blockwise(x))
    scaled = parts_of(x * 4, 150)[1]
    named = QuantizedShard("v", *list(vars(second).values())[1:])
    for parts, message in [
        ([], "no parts to join"),
        ([first], "leave a gap"),
        ([first, second, second], "overlap"),
        ([first, named], "one weight and format.*'w'.*'v'"),
        ([first, scaled], "w: the part .* has another scale than its neighbours"),
    ]:
        with pytest.raises(ShardError, match=message):
            join_shards(parts)
    with pytest.raises(ShardError, match=r"w: data and scale_inv of .* must have shapes"):
        QuantizedShard(*list(vars(first).values())[:4], first.scale_inv[:1], (128, 128), "pow2")
