"""Fingerprints: their plain definition, the damage they must see, and the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations
from operator import mul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.sync import fingerprint as module
from fp8rl.sync.errors import ManifestError
from fp8rl.sync.fingerprint import COLUMNS, ROW, SLAB, fingerprint, finite

DTYPES = [
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]
FLOATS = [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(autouse=True, scope="module", params=[module.LEAVES, 64])
def leaves(request: pytest.FixtureRequest) -> Iterator[None]:
    """With 64 the little data of these tests has a tree of several levels, as large data has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAVES", request.param)
        yield


def table() -> list[list[int]]:
    """The columns of TABLE."""
    head = hashlib.shake_128(module.SEED).digest(ROW * COLUMNS)
    columns = [[byte % 128 - 64 for byte in head[c::COLUMNS]] for c in range(COLUMNS)]
    return [[1] * ROW, *columns[1:]]


TABLE = table()


def signed(data: bytes) -> list[int]:
    return [byte - 256 if byte > 127 else byte for byte in data]


def level(data: bytes) -> bytes:
    padded = signed(data) + [0] * (-len(data) % ROW)
    rows = [padded[at : at + ROW] for at in range(0, len(padded), ROW)]
    products = [sum(map(mul, row, column)) for row in rows for column in TABLE]
    return b"".join(product.to_bytes(4, "little", signed=True) for product in products)


def plain(data: bytes, slab: int = SLAB) -> str:
    """The definition, in integers of Python."""
    tree = hashlib.blake2b(digest_size=8)
    for at in range(0, len(data), slab):
        part = data[at : at + slab]
        while len(part) > module.LEAVES:
            part = level(part)
        tree.update(part)
    tree.update(len(data).to_bytes(8, "little"))
    return f"{tree.hexdigest()}{sum(signed(data)) % 2**64:016x}"


def of(data: bytes | bytearray) -> str:
    return fingerprint(torch.tensor(list(data), dtype=torch.uint8))


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


@given(st.binary(max_size=70))
def test_it_is_its_plain_definition_for_any_short_bytes(data: bytes) -> None:
    assert of(data) == plain(data)


@pytest.mark.parametrize("count", [ROW - 1, ROW, ROW + 1, 3 * ROW + 17, 65 * ROW + 5])
def test_it_is_its_plain_definition_at_the_borders_of_rows_and_levels(count: int) -> None:
    data = noise(count)
    assert fingerprint(data) == plain(bytes(data.tolist()))


def test_it_is_its_plain_definition_over_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", 4 * ROW)
    data = noise(9 * ROW + 3)
    assert fingerprint(data) == plain(bytes(data.tolist()), slab=4 * ROW)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (3, 5, 2), (33, 129)])
def test_it_is_that_of_the_bytes_whatever_dtype_and_shape(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = (torch.arange(int(torch.Size(shape).numel())) % 2).to(dtype).reshape(shape)
    data = tensor.reshape(-1).view(torch.uint8)
    assert fingerprint(tensor) == plain(bytes(data.tolist()))
    assert fingerprint(tensor.t() if tensor.dim() == 2 else tensor) == fingerprint(
        tensor.t().contiguous() if tensor.dim() == 2 else tensor
    )


def test_every_flipped_bit_changes_it_for_certain() -> None:
    data = bytearray(noise(300).tolist())
    whole, total = of(data), of(data)[16:]
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        changed = of(data)
        assert changed != whole
        assert changed[16:] != total  # the plain sum alone sees it
        data[bit // 8] ^= 1 << bit % 8


@settings(max_examples=200)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 8 * 9000 - 1), min_size=1, max_size=4))
def test_flipped_bits_anywhere_change_it(seed: int, bits: list[int]) -> None:
    data = noise(9000, seed)
    whole = fingerprint(data)
    for bit in set(bits):
        data[bit // 8] ^= 1 << bit % 8
    assert fingerprint(data) != whole


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_two_flipped_sign_bits_never_cancel(width: int) -> None:
    data = noise(40 * width)
    seen = {fingerprint(data)}
    pairs = list(combinations(range(width - 1, 40 * width, width), 2))
    for first, second in pairs:
        damaged = data.clone()
        damaged[first] ^= 0x80
        damaged[second] ^= 0x80
        seen.add(fingerprint(damaged))
    assert len(seen) == 1 + len(pairs)


@settings(max_examples=100)
@given(
    st.sampled_from([1, 2, 4, 8, 64, 128, ROW]),
    st.integers(0, 4 * ROW - 1),
    st.integers(1, 4 * ROW - 1),
)
def test_swapped_blocks_change_it(size: int, first: int, apart: int) -> None:
    data = noise(6 * ROW)
    second = first + size + apart
    if second + size > len(data):
        second = len(data) - size
    swapped = data.clone()
    swapped[first : first + size] = data[second : second + size]
    swapped[second : second + size] = data[first : first + size]
    assert (fingerprint(swapped) == fingerprint(data)) == torch.equal(swapped, data)


@pytest.mark.parametrize("count", [5, 64, ROW, 5 * ROW + 3])
def test_shifted_truncated_and_extended_data_have_other_fingerprints(count: int) -> None:
    data = noise(count)
    others = [data.roll(by) for by in (1, 2, 4) if by < count]
    others += [data[:-1], data[1:], torch.cat([data, data[:1]])]
    others += [torch.nn.functional.pad(data, (0, more)) for more in (1, 8, ROW)]
    others += [torch.nn.functional.pad(data, (1, 0)), data.flip(0), data * 0]
    prints = [fingerprint(other) for other in [data, *others]]
    assert len(set(prints)) == len(prints)
    zeros = [fingerprint(torch.zeros(n, dtype=torch.uint8)) for n in range(20)]
    assert len(set(zeros)) == 20


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_finite_knows_every_number_of_a_short_dtype(dtype: torch.dtype) -> None:
    count = 2 ** (8 * dtype.itemsize)
    bits = torch.arange(count).to(torch.int32)
    numbers = bits.to(INTEGERS[dtype.itemsize]).view(dtype)
    expected = torch.isfinite(numbers.float())
    alone = (
        range(count) if count == 256 else [i for i in range(count) if i % 97 == 0 or i % 0x80 == 0]
    )
    assert all(finite(numbers[i]) == bool(expected[i]) for i in alone)
    assert finite(numbers[expected])
    assert not finite(numbers)


@given(st.lists(st.floats(width=32), max_size=20))
def test_finite_is_that_of_torch_in_fp32(numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)
    assert finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, 1_500_000, -1])
def test_finite_sees_one_nan_anywhere_in_a_large_tensor(dtype: torch.dtype, at: int) -> None:
    tensor = torch.zeros(2, 1_000_000).to(dtype)
    assert finite(tensor) and finite(tensor.t())
    tensor.view(-1)[at] = float("nan")
    assert not finite(tensor)
    assert not finite(tensor.t())


@pytest.mark.parametrize("dtype", FLOATS)
def test_finite_takes_numbers_whose_sum_is_infinite_and_no_numbers_at_all(
    dtype: torch.dtype,
) -> None:
    assert finite(torch.full((99,), torch.finfo(dtype).max).to(dtype))
    assert finite(torch.zeros(0).to(dtype))


def test_finite_refuses_a_dtype_that_it_does_not_know() -> None:
    with pytest.raises(ManifestError, match="float8_e5m2"):
        finite(torch.zeros(0).to(torch.float8_e5m2))
    with pytest.raises(ManifestError, match=r"float8_e5m2"):
        finite(torch.zeros(3).to(torch.float8_e5m2))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 100, ROW, 17 * ROW + 3, SLAB + 5])
def test_a_gpu_agrees(count: int) -> None:
    data = noise(count)
    assert fingerprint(data.cuda()) == fingerprint(data)
    numbers = torch.zeros(count)
    assert finite(numbers.cuda())
    if count:
        numbers[-1] = float("inf")
        assert not finite(numbers.cuda())
