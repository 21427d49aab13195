"""A delta turns its base into the new tensor, byte for byte, is small, and refuses whatever is not
one before it writes a byte."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import quantize_blockwise
from fp8rl.sync import delta
from fp8rl.sync.delta import FRAME, FRAME_HEADER, HEADER, apply_delta, encode_delta
from fp8rl.sync.elias_fano import decode_positions, encode_positions, encoded_size
from fp8rl.sync.errors import DeltaError

SMALL_FRAME = 64


@contextmanager
def small_frames() -> Iterator[None]:
    """Frames of 64 bytes, so that small tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "FRAME", SMALL_FRAME)
        yield


def noise(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def changed(base: torch.Tensor, places: torch.Tensor, by: int = 1) -> torch.Tensor:
    new = base.clone()
    new[places] += by
    return new


def encoded(base: torch.Tensor, new: torch.Tensor, **options: int) -> torch.Tensor:
    payload = encode_delta(base, new, **options)
    assert payload is not None and payload.numel() < base.numel()
    return payload


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two tensors that differ nowhere, everywhere, or in some share of their bytes, anyhow."""
    width = draw(st.sampled_from([1, 2]))
    size, offset = width * draw(st.integers(0, 2000)), draw(st.integers(0, 9))
    base = noise(size + offset, draw(st.integers(0, 2**32)))[offset:]
    share = draw(st.sampled_from([0.0, 0.002, 0.02, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    steps = draw(st.sampled_from([torch.tensor([1, 255]), torch.arange(1, 256)])).to(torch.uint8)
    step = steps[torch.randint(len(steps), (size,), generator=generator)]
    moved = torch.rand(size, generator=generator) < share
    return base, torch.where(moved, base + step, base), width


@small_frames()
@settings(max_examples=150, deadline=None)
@given(pairs())
def test_applied_to_its_base_a_delta_gives_the_new_tensor(pair):
    base, new, width = pair
    payload = encode_delta(base, new, width=width)
    if payload is None:
        return
    before = base.clone()
    assert torch.equal(apply_delta(base, payload), new)
    assert torch.equal(base, before)
    out = torch.empty_like(base)
    assert apply_delta(base, payload, out=out) is out
    assert torch.equal(out, new)
    assert apply_delta(base, payload, out=base) is base
    assert torch.equal(base, new)


SIZE = 2 * FRAME + 13
PLACES = {
    "nothing": torch.tensor([], dtype=torch.int64),
    "the first byte": torch.tensor([0]),
    "the last byte": torch.tensor([SIZE - 1]),
    "around the border of a frame": torch.tensor([FRAME - 1, FRAME, 2 * FRAME - 1, 2 * FRAME]),
    "one frame alone": torch.arange(FRAME, 2 * FRAME),
    "everything": torch.arange(SIZE),
}


@pytest.mark.parametrize("places", PLACES)
def test_wherever_the_changes_lie(places):
    base = noise(SIZE, 0)
    new = changed(base, PLACES[places])
    assert torch.equal(apply_delta(base, encoded(base, new)), new)


def test_a_tensor_longer_than_four_gigabytes():
    base, new = (torch.from_numpy(np.zeros(2**32 + 3, np.uint8)) for _ in range(2))  # lazy memory
    new[[0, 2**32 - 1, 2**32, 2**32 + 2]] = 7
    payload = encoded(base, new)
    apply_delta(base, payload, out=base)
    assert base[[0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**32 + 2]].tolist() == [7, 0, 7, 7, 0, 7]


def test_there_is_no_delta_where_whole_bytes_are_no_larger():
    base = noise(100_000, 0)
    assert encode_delta(base, noise(100_000, 1)) is None
    assert encode_delta(base[:30], base[:30]) is None  # a header and an unchanged frame
    assert encoded(base[:31], base[:31]).numel() == HEADER.size + FRAME_HEADER[1].size == 30
    assert encode_delta(base[:0], base[:0]) is None
    assert encode_delta(base[: 2**7], changed(base[: 2**7], torch.arange(2**7), by=9)) is not None


def test_tensors_that_cannot_be_compared_are_refused():
    base = noise(31, 0)
    with pytest.raises(DeltaError, match="base has 31 bytes and new 30; expected as many"):
        encode_delta(base, base[:30])
    with pytest.raises(DeltaError, match=r"whole elements of 2 byte\(s\)"):
        encode_delta(base, base, width=2)
    with pytest.raises(DeltaError, match=r"new is torch.uint8 on cpu with strides \(2,\)"):
        encode_delta(base[:16], base[::2])
    with pytest.raises(DeltaError, match=r"out is torch\.uint8 on meta"):
        apply_delta(base, base, out=base.to("meta"))


# ---- its size


def step_of_adam(learning_rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A 1000 x 1000 master of sigma 0.02 before and after a step of 0.3 to 1 times the rate."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(1000, 1000, generator=generator) * 0.02
    size = torch.empty_like(master).uniform_(0.3, 1.0, generator=generator)
    sign = torch.randn(master.shape, generator=generator).sign()
    return master, master + learning_rate * size * sign


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def test_fp8_codes_cost_a_quarter_of_a_percent_of_their_bf16_bytes_at_rate_1e_6():
    before, after = step_of_adam(1e-6)
    base, new = (as_bytes(quantize_blockwise(x.bfloat16()).data) for x in (before, after))
    share = float((base != new).float().mean())
    assert 0.002 < share < 0.003
    entropy = share * (1 - np.log2(share)) + share * 1.44  # positions, and one bit of direction
    payload = encoded(base, new)
    assert payload.numel() / (2 * base.numel()) < 0.0021
    assert 8 * payload.numel() / base.numel() < 1.12 * entropy


def test_bf16_weights_are_cheaper_as_elements_than_as_bytes():
    base, new = (as_bytes(x.bfloat16()) for x in step_of_adam(1e-6))
    share = float((base.view(torch.int16) != new.view(torch.int16)).float().mean())
    assert 0.02 < share < 0.04
    elements, single_bytes = (encoded(base, new, width=w).numel() for w in (2, 1))
    assert elements < 0.95 * single_bytes
    assert elements / base.numel() < 0.015


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_positions_take_two_bits_more_than_their_logarithm(data):
    universe = data.draw(st.integers(1, 3000))
    chosen = data.draw(st.sets(st.integers(0, universe - 1), min_size=1))
    positions, count = np.array(sorted(chosen), np.uint32), len(chosen)
    packed = encode_positions(positions, universe)
    assert len(packed) == encoded_size(count, universe)
    assert 8 * len(packed) <= count * (2 + np.log2(universe / count)) + 16
    again = decode_positions(np.frombuffer(packed, np.uint8), count, universe)
    assert again.tolist() == positions.tolist()


# ---- what is no delta


def frame(positions: bytes, values: bytes, count: int, packed: int | None = None) -> bytes:
    nbytes = len(values) if packed is None else packed
    return FRAME_HEADER[1].pack(count, nbytes) + positions + values


def bf16_frame(positions: bytes, values: bytes, large: int, small: int, bound: int) -> bytes:
    return FRAME_HEADER[2].pack(large, len(values), small, bound) + positions + values


def payload_of(body: bytes, *, width: int = 1, size: int = 1000, claimed: int | None = None):
    header = HEADER.pack(b"FP8D", 2, width, size, len(body) if claimed is None else claimed)
    return torch.frombuffer(bytearray(header + body), dtype=torch.uint8)


def at(*positions: int, universe: int = 1000) -> bytes:
    return encode_positions(np.array(positions, np.uint32), universe)


def flipped(data: bytes, bit: int) -> bytes:
    return bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(data))


TWO, ONES = at(3, 500), zlib.compress(b"\1\1")
GOOD = frame(TWO, ONES, 2)
BOMB = zlib.compress(bytes(10**8))
EMPTY = FRAME_HEADER[1].pack(0, 0)
# k is 8 for two positions below 1000: 5 bits of unary gaps in the first byte, 16 low bits.
MALFORMED = {
    "no header": (torch.zeros(21, dtype=torch.uint8), "21 bytes, expected a header of 22"),
    "another magic": (payload_of(GOOD)[1:], "begins with b'P8D"),
    "another format": (
        torch.cat([payload_of(GOOD)[:4], torch.tensor([1], dtype=torch.uint8)] * 5),
        "format 1, expected b'FP8D' format 2",
    ),
    "another width": (payload_of(GOOD, width=3), "elements of 3 bytes in a tensor of 1000"),
    "half an element": (payload_of(GOOD, width=2, size=999), "elements of 2 bytes in a tensor of"),
    "a smaller tensor": (payload_of(GOOD, size=999), "of 999 bytes, and base has 1000"),
    "a huge tensor": (payload_of(GOOD, size=2**64 - 1), f"of {2**64 - 1} bytes, and base has"),
    "cut off": (payload_of(GOOD)[:-1], "cut off, or joined with something else"),
    "bytes after it": (payload_of(GOOD + b"\0", claimed=len(GOOD)), "cut off, or joined"),
    "a huge length": (payload_of(GOOD, claimed=2**64 - 1), rf"expected 22 \+ {2**64 - 1}"),
    "bytes after its frames": (payload_of(GOOD + b"\0"), "1 bytes after its last frame"),
    "no frame": (payload_of(b""), "frame at byte 0: the payload ends before it"),
    "half a frame header": (payload_of(b"\0" * 7), "frame at byte 0: the payload ends before it"),
    "a frame cut off": (payload_of(GOOD[:-1]), "ends at byte .* of a payload of"),
    "too many changes": (payload_of(frame(TWO, ONES, 1001)), "and 1001 others"),
    "differences of none": (payload_of(frame(b"", ONES, 0)), "no differences of none"),
    "a huge count": (payload_of(frame(TWO, ONES, 2**32 - 1)), f"and {2**32 - 1} others"),
    "huge differences": (payload_of(frame(TWO, ONES, 2, 2**32 - 1)), "ends at byte 429496"),
    "one position less": (payload_of(frame(flipped(TWO, 0), ONES, 2)), "found 1, expected 2"),
    "one position more": (payload_of(frame(flipped(TWO, 1), ONES, 2)), "found 3, expected 2"),
    "bits after the positions": (payload_of(frame(flipped(TWO, 7), ONES, 2)), "are set"),
    "a position twice": (
        payload_of(frame(bytes([0b0011, 7, 7]), ONES, 2)),
        "some that do not rise",
    ),
    "positions that fall": (payload_of(frame(bytes([0b0011, 7, 6]), ONES, 2)), "do not rise"),
    "a position out of range": (
        payload_of(frame(bytes([0b10001, 3, 255]), ONES, 2)),
        "found 1023, expected all below 1000",
    ),
    "a bomb": (payload_of(frame(TWO, BOMB, 2)), "found at least 3 bytes"),
    "too few differences": (payload_of(frame(TWO, zlib.compress(b"\1"), 2)), "found 1 bytes, an"),
    "no end of them": (payload_of(frame(TWO, ONES[:-1], 2)), "found 2 bytes, no end"),
    "bytes after them": (payload_of(frame(TWO, ONES + b"xy", 2)), "and 2 bytes after it"),
    "a checksum of others": (payload_of(frame(TWO, flipped(ONES, 8 * 9), 2)), "incorrect data"),
    "no zlib": (payload_of(frame(TWO, b"\0" * 9, 2)), "differences: Error -3"),
    "a difference of zero": (payload_of(frame(TWO, zlib.compress(b"\1\0"), 2)), "that is zero"),
}


def test_the_payloads_below_differ_from_a_good_one_by_their_mistake():
    assert apply_delta(
        torch.zeros(1000, dtype=torch.uint8), payload_of(GOOD)
    ).nonzero().tolist() == [
        [3],
        [500],
    ]
    assert (len(TWO), TWO[0]) == (3, 0b101)


@pytest.mark.parametrize("mistake", MALFORMED)
def test_a_malformed_payload_is_refused_with_its_reason(mistake):
    payload, reason = MALFORMED[mistake]
    base = noise(1000, 0)
    before = base.clone()
    with pytest.raises(DeltaError, match=reason):
        apply_delta(base, payload, out=base)
    assert torch.equal(base, before)


# of elements 0, 1, .. 499 those below 100 are small: one of these changed, and one of the others
SMALL, LARGE, STEPS = at(3, universe=100), at(300, universe=500), zlib.compress(b"\2\2\0\0")
MALFORMED_BF16 = {
    "a bound of no small ones": (bf16_frame(SMALL + LARGE, STEPS, 2, 0, 100), "0 changed .* 100"),
    "small ones and no bound": (bf16_frame(SMALL + LARGE, STEPS, 1, 1, 0), "1 changed .* below 0"),
    "too many small": (bf16_frame(SMALL + LARGE, STEPS, 1, 101, 100), "at most 100 and 400"),
    "too many large": (bf16_frame(SMALL + LARGE, STEPS, 401, 1, 100), "at most 100 and 400"),
    "a small one among the large": (
        bf16_frame(SMALL + at(99, universe=500), STEPS, 1, 1, 100),
        "an element below 100 among the large",
    ),
    "half a frame header": (b"\0" * 13, "the payload ends before it"),
}


def test_small_and_large_elements_of_bf16_change_where_they_should():
    base = torch.arange(500, dtype=torch.int16)
    body = bf16_frame(SMALL + LARGE, STEPS, 1, 1, 100)
    after = apply_delta(base.view(torch.uint8), payload_of(body, width=2)).view(torch.int16)
    assert (after - base).nonzero().tolist() == [[3], [300]]
    assert (after - base).sum() == 2


@pytest.mark.parametrize("mistake", MALFORMED_BF16)
def test_a_malformed_delta_of_bf16_is_refused_with_its_reason(mistake):
    body, reason = MALFORMED_BF16[mistake]
    base = torch.arange(500, dtype=torch.int16).view(torch.uint8)
    with pytest.raises(DeltaError, match=f"frame at byte 0: .*{reason}"):
        apply_delta(base, payload_of(body, width=2))


@small_frames()
def test_a_mistake_in_the_last_frame_is_found_before_the_first_is_written():
    base = torch.zeros(2 * SMALL_FRAME, dtype=torch.uint8)
    good = frame(at(3, universe=64), zlib.compress(b"\2"), 1)
    bad = frame(at(3, universe=64), zlib.compress(b"\0"), 1)
    size = base.numel()
    assert apply_delta(base, payload_of(good + good, size=size)).sum() == 2
    with pytest.raises(DeltaError, match="frame at byte 64: differences: found one that is zero"):
        apply_delta(base, payload_of(good + bad, size=size), out=base)
    assert base.sum() == 0


@small_frames()
@settings(max_examples=200, deadline=None)
@given(pair=pairs(), data=st.data())
def test_a_damaged_payload_is_refused_or_touches_nothing_but_its_target(pair, data):
    base, new, width = pair
    payload = encode_delta(base, new, width=width)
    if payload is None:
        return
    damaged = bytearray(payload.numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert"]))
        if kind == "byte":
            damaged[place] = data.draw(st.integers(0, 255))
        elif kind == "cut" and len(damaged) > 1:
            del damaged[place]
        else:
            damaged.insert(place, data.draw(st.integers(0, 255)))
    arena = torch.full((base.numel() + 64,), 0xAA, dtype=torch.uint8)
    out = arena[32:-32]
    try:
        apply_delta(base, torch.frombuffer(damaged, dtype=torch.uint8), out=out)
    except DeltaError:
        assert (arena == 0xAA).all()
    assert (arena[:32] == 0xAA).all() and (arena[-32:] == 0xAA).all()
