"""The observer sees every real token, no padding, counts exactly, and says what it missed."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    AttentionShape,
    KVObservation,
    KVObserver,
    KVScaleError,
    KVScales,
    kv_observer,
)

from .refusal import refusal

SHAPE = AttentionShape(layers=2, q_heads=4, kv_heads=2)
ONE = AttentionShape(layers=1, q_heads=4, kv_heads=2)


def qkv(tokens: tuple[int, ...], seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*tokens, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
    )


def amax_of(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([x.abs().max().item() for x in parts])


def seen(*calls, shape=ONE, **options) -> KVObservation:
    observer = KVObserver(shape, **options)
    for layer, parts, *mask in calls:
        observer.observe(layer, *parts, *mask)
    return observer.observation()


def same(a: KVObservation, b: KVObservation) -> bool:
    return a.to_json() == b.to_json()


def test_amax_is_the_largest_magnitude_over_all_calls():
    first, second, other = qkv((5,), 1), qkv((3, 2), 2), qkv((11,), 3)
    found = seen((0, first), (0, second), (1, other), shape=SHAPE)
    want = torch.stack([torch.maximum(amax_of(first), amax_of(second)), amax_of(other)])
    assert torch.equal(found.amax(), want)
    assert found.tokens == 11


def test_the_magnitudes_of_heads_are_kept():
    parts = qkv((5,))
    found = seen((0, parts))
    for x, part in zip("qkv", parts, strict=True):
        assert found.head_amax(0, x) == tuple(part.abs().amax(dim=(0, 2)).tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_exact_and_the_graph_is_left_alone(dtype):
    parts = tuple(x.requires_grad_() for x in qkv((3,), dtype=dtype))
    found = seen((0, parts))
    assert torch.equal(found.amax()[0], amax_of(parts))
    assert not found.amax().requires_grad


def test_tensors_that_are_views_are_read_as_they_are():
    mixed = torch.randn(6, 2, 8, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    views = mixed[:, :, :4, :8], mixed[:, :, 4:6, 8:16], mixed[:, :, 6:, 16:]
    assert same(seen((0, views)), seen((0, tuple(x.contiguous() for x in views))))


@pytest.mark.parametrize("tokens", [(40, 3), (3, 40), (100,)])
@pytest.mark.parametrize("padded", [False, True])
def test_large_tensors_are_looked_at_in_pieces(monkeypatch, tokens, padded):
    parts = qkv(tokens, dtype=torch.bfloat16)
    mask = (torch.arange(math.prod(tokens)) % 3 > 0).reshape(tokens) if padded else None
    options = {
        "histogram": True,
        "in_use": KVScales.from_amax(torch.ones(1, 3), version=0, tokens=1),
    }
    whole = seen((0, parts, mask), **options)
    monkeypatch.setattr(kv_observer, "PIECE", 100)
    assert same(seen((0, parts, mask), **options), whole)


def test_ranks_heads_and_dtypes_join():
    q, k, v = qkv((6,))
    observer = KVObserver(ONE, histogram=True)
    for first, dtype in ((0, torch.float32), (1, torch.bfloat16)):
        part = [
            x.to(dtype)
            for x in (q[:, 2 * first :][:, :2], k[:, first:][:, :1], v[:, first:][:, :1])
        ]
        observer.observe(0, *part, first_q_head=2 * first, first_kv_head=first)
    found = observer.observation()
    assert found.tokens == 6
    assert torch.allclose(found.amax()[0], amax_of((q, k, v)), rtol=2**-8)
    assert found.percentile(100.0).equal(found.amax())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=6, max_size=6))
def test_padding_changes_nothing_whatever_stands_there(seed, real):
    mask = torch.tensor(real).reshape(2, 3)
    clean = qkv((2, 3), seed)
    dirty = tuple(x.clone() for x in clean)
    for x, junk in zip(dirty, (math.nan, math.inf, 1e30), strict=True):
        x[~mask] = junk
    options = {
        "histogram": True,
        "in_use": KVScales.from_amax(torch.ones(1, 3), version=0, tokens=1),
    }
    packed = seen((0, tuple(x[mask] for x in clean)), **options)
    assert same(seen((0, dirty, mask), **options), packed)


def test_a_call_without_real_tokens_is_no_observation():
    nothing = seen((0, qkv((2,)), torch.tensor([False, False])), (0, qkv((0,))))
    with pytest.raises(KVScaleError, match="nothing was observed in any of 1 layers"):
        nothing.amax()


def test_layers_never_seen_are_named():
    four = AttentionShape(4, 4, 2)
    with pytest.raises(KVScaleError, match=r"layers \[0, 1, 3\] of 4 .*layer 0: q saw 0 of 2"):
        seen((2, qkv((2,))), shape=four).amax()


def test_a_layer_that_saw_fewer_tokens_is_named():
    found = seen((0, qkv((5,))), (1, qkv((4,))), shape=SHAPE)
    with pytest.raises(KVScaleError, match=r"layers \[1\] of 2 .*layer 1: q saw 4 of 5 tokens"):
        found.amax()


def test_heads_never_seen_are_named():
    q, k, v = qkv((3,))
    observer = KVObserver(ONE)
    observer.observe(0, q[:, :2], k[:, 1:], v[:, 1:], first_q_head=2, first_kv_head=1)
    with pytest.raises(KVScaleError, match=r"q heads \[0, 1\] saw 0 of 3.*k heads \[0\] saw 0"):
        observer.observation().amax()


def test_key_heads_that_ranks_replicate_are_seen_several_times():
    q, k, v = qkv((3,))
    observer = KVObserver(AttentionShape(1, 4, 1))
    for first in range(4):
        part = q[:, first : first + 1]
        observer.observe(0, part, k[:, :1], v[:, :1], first_q_head=first)
    found = observer.observation()
    assert torch.equal(found.amax()[0], amax_of((q, k[:, :1], v[:, :1])))
    assert found.tokens == 3


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("which", "name"), [(0, "q head 2"), (1, "k head 1"), (2, "v head 1")])
def test_a_non_finite_value_at_a_real_token_names_layer_tensor_and_head(bad, which, name):
    parts = qkv((3,), dtype=torch.bfloat16)
    parts[which][1, int(name[-1]), 0] = bad
    found = seen((0, qkv((3,), dtype=torch.bfloat16)), (1, parts), shape=SHAPE)
    with pytest.raises(KVScaleError, match=f"NaN or Inf .* in 1 head.*: layer 1 {name};"):
        found.amax()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(-12, 4),
    st.sampled_from(["pow2", "fp32"]),
)
def test_saturation_and_underflow_are_those_of_the_cast(seed, dtype, exponent, scale_format):
    parts = tuple(x * 2.0**exponent for x in qkv((7,), seed, dtype))
    in_use = KVScales.from_amax(
        torch.tensor([[0.7, 300.0, 20000.0]]), version=0, tokens=1, scale_format=scale_format
    )
    found = seen((0, parts), in_use=in_use)
    for column, part in enumerate(parts):
        scaled = part.double() / float(in_use.scales()[0, column])  # a float64 oracle
        clipped = (scaled.abs() > 448).double().mean()
        lost = ((scaled != 0) & (scaled.float().to(torch.float8_e4m3fn).float() == 0)).double()
        assert float(found.saturation()[0, column]) == pytest.approx(float(clipped), abs=0)
        if scale_format == "pow2":  # the division is exact, so the cast itself is the oracle
            assert float(found.underflow()[0, column]) == pytest.approx(float(lost.mean()), abs=0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([0.01, 1.0, 37.5, 50.0, 90.0, 99.0, 99.9, 100.0]),
    st.integers(1, 5),
)
def test_a_percentile_is_at_most_a_bin_above_the_exact_one(seed, dtype, percent, calls):
    batches = [qkv((9,), seed + i, dtype) for i in range(calls)]
    found = seen(*[(0, batch) for batch in batches], histogram=True).percentile(percent)
    for column in range(3):
        elements = torch.cat([batch[column].flatten() for batch in batches]).abs().double()
        rank = math.ceil(len(elements) * percent / 100)
        exact = float(elements.kthvalue(rank).values)
        assert exact <= float(found[0, column]) <= max(exact * (1 + 2.0**-5), exact + 2.0**-131)
        assert float(found[0, column]) <= float(elements.max())


def test_the_100th_percentile_is_amax():
    found = seen((0, qkv((9,))), histogram=True)
    assert torch.equal(found.percentile(100.0), found.amax())


def test_a_percentile_without_histogram_or_out_of_range_is_refused():
    with pytest.raises(KVScaleError, match="histogram=True"):
        seen((0, qkv((2,)))).percentile(99.0)
    for percent in (0.0, -1.0, 100.5, math.nan):
        with pytest.raises(KVScaleError, match="percent must be above 0"):
            seen((0, qkv((2,))), histogram=True).percentile(percent)


def test_an_observation_is_a_copy():
    observer = KVObserver(ONE, histogram=True)
    observer.observe(0, *qkv((3,)))
    before, text = observer.observation(), json.dumps(observer.observation().to_json())
    observer.observe(0, *qkv((30,), 5))
    assert json.dumps(before.to_json()) == text


@pytest.mark.parametrize("histogram", [False, True])
def test_json_gives_back_an_equal_observation(histogram):
    found = seen((0, qkv((3,))), (1, qkv((3,), 1)), shape=SHAPE, histogram=histogram)
    again = KVObservation.from_json(json.loads(json.dumps(found.to_json())))
    assert same(again, found)
    assert torch.equal(again.amax(), found.amax())


def test_what_does_not_fit_is_refused():
    q, k, v = qkv((3,))
    observer = KVObserver(SHAPE)
    eight = q.to(torch.float8_e4m3fn)
    for call, message in [
        (lambda: AttentionShape(0, 4, 2), "layers must be an integer of at least 1"),
        (lambda: observer.observe(2, q, k, v), r"layer must be in 0\.\.1, found 2"),
        (lambda: observer.observe(-1, q, k, v), "found -1"),
        (lambda: observer.observe(0, q, k, v, first_q_head=1), r"q has heads 1\.\.4, .* 4 heads"),
        (lambda: observer.observe(0, q, k, v, first_kv_head=-1), r"k has heads -1\.\.0"),
        (lambda: observer.observe(0, eight, k, v), "q is torch.float8_e4m3fn.*before it is quant"),
        (
            lambda: KVObserver(
                SHAPE, in_use=KVScales.from_amax(torch.ones(1, 3), version=0, tokens=1)
            ),
            "scales in use are of 1 layers, the model has 2",
        ),
    ]:
        with pytest.raises(KVScaleError, match=message):
            call()
    for mistake in [(q[:2], k, v), (q[0], k[0], v[0]), (q, k, v, torch.ones(2, dtype=torch.bool))]:
        with refusal(KVScaleError, "q, k and v must be|mask must be") as found:
            observer.observe(0, *mistake)
        assert str(found.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_shows_what_the_cpu_shows(dtype):
    mask = torch.arange(60).view(3, 20) % 7 > 1
    in_use = KVScales.from_amax(torch.tensor([[0.7, 2.0, 900.0]]), version=0, tokens=1)
    options = {"histogram": True, "in_use": in_use}
    parts = qkv((3, 20), dtype=dtype)
    on_gpu = seen((0, tuple(x.cuda() for x in parts), mask.cuda()), **options)
    assert same(on_gpu, seen((0, parts, mask), **options))
