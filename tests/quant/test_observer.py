"""The observer sees every real token, no padding, and says which layers it never saw."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import AmaxObserver, KVScaleError

from .refusal import refusal


def qkv(tokens: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*tokens, heads, 8, generator=generator) for heads in (4, 2, 2))


def amax_of(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([x.abs().max().item() for x in parts])


def test_amax_is_the_largest_magnitude_over_all_calls():
    observer = AmaxObserver(2)
    first, second, other = qkv((5,), 1), qkv((3, 2), 2), qkv((4,), 3)
    observer.observe(0, *first)
    observer.observe(0, *second)
    observer.observe(1, *other)
    want = torch.stack([torch.maximum(amax_of(first), amax_of(second)), amax_of(other)])
    assert torch.equal(observer.amax(), want)
    assert observer.tokens == 4  # layer 0 saw 11, layer 1 saw 4


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.booleans(), min_size=6, max_size=6))
def test_padding_changes_nothing_whatever_stands_there(seed, real):
    mask = torch.tensor(real).reshape(2, 3)
    clean = qkv((2, 3), seed)
    dirty = tuple(x.clone() for x in clean)
    for x, junk in zip(dirty, (math.nan, math.inf, 1e30), strict=True):
        x[~mask] = junk
    packed, padded = AmaxObserver(1), AmaxObserver(1)
    packed.observe(0, *(x[mask] for x in clean))
    padded.observe(0, *dirty, mask)
    assert torch.equal(padded.partial_amax(), packed.partial_amax())
    assert padded.tokens == packed.tokens == sum(real)


def test_a_call_without_real_tokens_is_no_observation():
    observer = AmaxObserver(1)
    observer.observe(0, *qkv((2,)), torch.tensor([False, False]))
    observer.observe(0, *qkv((0,)))
    assert observer.tokens == 0
    with pytest.raises(KVScaleError, match=r"layers \[0\] of 1 were never observed"):
        observer.amax()


def test_layers_never_seen_are_named():
    observer = AmaxObserver(4)
    observer.observe(2, *qkv((2,)))
    with pytest.raises(KVScaleError, match=r"layers \[0, 1, 3\] of 4 were never observed"):
        observer.amax()


def test_a_max_over_ranks_equals_one_observer_that_saw_it_all():
    ranks, whole = [AmaxObserver(3) for _ in range(2)], AmaxObserver(3)
    for rank, layer, seed in [(0, 0, 1), (0, 1, 2), (1, 1, 3), (1, 2, 4)]:
        ranks[rank].observe(layer, *qkv((4,), seed))
        whole.observe(layer, *qkv((4,), seed))
    assert (ranks[0].partial_amax()[2] == -1).all()
    joined = torch.maximum(*(rank.partial_amax() for rank in ranks))
    assert torch.equal(joined, whole.amax())


def test_observing_bfloat16_with_gradients_is_exact_and_leaves_the_graph_alone():
    parts = tuple(x.bfloat16().requires_grad_() for x in qkv((3,)))
    observer = AmaxObserver(1)
    observer.observe(0, *parts)
    assert observer.amax().dtype == torch.float32
    assert torch.equal(observer.amax()[0], amax_of(parts))
    assert not observer.amax().requires_grad


def test_what_is_returned_is_a_copy():
    observer = AmaxObserver(1)
    observer.observe(0, *qkv((3,)))
    before = observer.amax()
    observer.amax().zero_()
    observer.partial_amax().zero_()
    assert torch.equal(observer.amax(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_non_finite_value_at_a_real_token_is_an_error_and_is_not_taken_in(bad, which):
    observer = AmaxObserver(2)
    parts = qkv((3,))
    parts[which][1, 0, 0] = bad
    with pytest.raises(KVScaleError, match=r"layer 1: observed amax of \(q, k, v\)"):
        observer.observe(1, *parts)
    assert (observer.partial_amax() == -1).all()
    assert observer.tokens == 0


def test_what_does_not_fit_is_refused():
    q, k, v = qkv((3,))
    observer = AmaxObserver(2)
    for call, message in [
        (lambda: AmaxObserver(0), "num_layers must be at least 1"),
        (lambda: observer.observe(2, q, k, v), r"layer must be in 0\.\.1, found 2"),
        (lambda: observer.observe(-1, q, k, v), "found -1"),
    ]:
        with pytest.raises(KVScaleError, match=message):
            call()
    for mistake in [(q[:2], k, v), (q[0], k[0], v[0]), (q, k, v, torch.ones(2, dtype=torch.bool))]:
        with refusal(KVScaleError, "q, k and v must be|mask must be"):
            observer.observe(0, *mistake)
