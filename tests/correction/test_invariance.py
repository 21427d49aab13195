"""What must not change a result: order, splitting, padding, and what stands at masked positions."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import (
    MIS,
    TIS,
    IcePop,
    PPOClip,
    Reject,
    Veto,
    correct,
    correction_metrics,
    count,
    policy_loss,
    total,
)

STAGES = [
    [],
    [TIS(cap=1.3)],
    [TIS(level="sequence")],
    [TIS(level="geometric", cap=1.1)],
    [MIS()],
    [MIS(level="sequence", low=0.1, high=10)],
    [MIS(level="geometric", low=0.8, high=1.2)],
    [IcePop(level="sequence", low=0.2)],
    [Reject(level="seq_mean", low=0.8, high=1.2), TIS()],
    [Reject(level="seq_max", divergence="k3", high=0.3), Veto(floor=0.3), TIS(level="sequence")],
    [Reject(level="seq_sum", divergence="k2", high=1.0), Reject(low=0.6, high=1.8)],
]
every_list = pytest.mark.parametrize(
    "stages", STAGES, ids=lambda x: "-".join([s.kind for s in x] + [s.level for s in x[:1]])
)
some_batches = given(seed=st.integers(0, 2**32), rows=st.integers(2, 6), tokens=st.integers(1, 9))
fast = settings(deadline=None, max_examples=25)


def loss_and_grad(b, stages, counts=None):
    new = b.leaf()
    c = correct(stages, b.old, b.rollout, b.mask)
    out = policy_loss(PPOClip(), new, b.old, b.advantages, c.weights, c.kept, counts=counts)
    out.loss.backward()
    return out.loss.detach(), new.grad, out.metrics


def padded(b, columns, filler):
    wide = {
        name: torch.cat([x, torch.full((len(x), columns), filler, dtype=x.dtype)], dim=1)
        for name, x in vars(b).items()
        if name not in ("advantages", "mask")
    }
    pad = torch.zeros(len(b.mask), columns, dtype=torch.bool)
    return replace(b, mask=torch.cat([b.mask, pad], dim=1), **wide)


@every_list
@some_batches
@fast
def test_permuting_the_batch_permutes_the_gradient(make_batch, stages, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss, grad, _ = loss_and_grad(b, stages)
    loss_permuted, grad_permuted, _ = loss_and_grad(b.select(order), stages)
    torch.testing.assert_close(loss_permuted, loss)
    assert torch.equal(grad_permuted, grad[order])


@every_list
@some_batches
@fast
def test_micro_batches_with_the_global_denominator_add_up(make_batch, stages, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    loss, grad, metrics = loss_and_grad(b, stages)
    counts = count(correct(stages, b.old, b.rollout, b.mask).kept)
    parts = [
        loss_and_grad(b.select(rows), stages, counts) for rows in (slice(0, 1), slice(1, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)
    for name, value in metrics.items():
        if name != "policy/ratio_max":
            torch.testing.assert_close(parts[0][2][name] + parts[1][2][name], value)


@every_list
@some_batches
@fast
def test_padding_further_changes_nothing(make_batch, stages, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    wide = padded(b, columns=5, filler=-1.0)
    loss, grad, _ = loss_and_grad(b, stages)
    loss_wide, grad_wide, _ = loss_and_grad(wide, stages)
    torch.testing.assert_close(loss_wide, loss)
    torch.testing.assert_close(grad_wide[:, :tokens], grad)
    assert not grad_wide[:, tokens:].any()


@every_list
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 123.0])
@given(seed=st.integers(0, 2**32))
@fast
def test_what_stands_at_masked_positions_is_never_read(make_batch, stages, poison, seed):
    b = make_batch(seed)
    b.mask[0] = False  # a row of padding alone, whose advantage may be poisoned too
    b.mask[1, 0] = True
    b.advantages = b.advantages[:, None].expand_as(b.mask).clone()
    p = replace(
        b,
        **{name: torch.where(b.mask, x, poison) for name, x in vars(b).items() if name != "mask"},
    )
    loss, grad, metrics = loss_and_grad(b, stages)
    loss_poisoned, grad_poisoned, metrics_poisoned = loss_and_grad(p, stages)
    assert torch.equal(loss_poisoned, loss)
    assert torch.equal(grad_poisoned, grad)
    assert not grad_poisoned[~b.mask].any()
    assert metrics_poisoned == metrics
    clean, dirty = (correct(stages, x.old, x.rollout, x.mask) for x in (b, p))
    assert torch.equal(clean.weights, dirty.weights) and torch.equal(clean.kept, dirty.kept)
    assert dirty.metrics() == clean.metrics()


def test_poison_at_a_masked_row_of_per_sequence_advantages_and_in_weights_is_not_read(make_batch):
    b = make_batch(0)
    b.mask[0] = False
    new, weights = b.leaf(), torch.where(b.mask, 1.0, math.nan)
    b.advantages[0] = math.nan
    out = policy_loss(PPOClip(), new, b.old, b.advantages, weights, b.mask)
    out.loss.backward()
    assert out.loss.isfinite() and new.grad.isfinite().all() and not new.grad[0].any()


@every_list
@some_batches
@fast
def test_statistics_of_micro_batches_give_the_metrics_of_the_whole(
    make_batch, stages, seed, rows, tokens
):
    b = make_batch(seed, rows, tokens)
    b.mask[0, 0] = True
    b.mask[-1] = False  # a micro-batch may hold no token at all
    whole = correct(stages, b.old, b.rollout, b.mask).metrics()
    parts = [
        correct(stages, x.old, x.rollout, x.mask).statistics
        for x in (b.select(slice(0, 1)), b.select(slice(1, -1)), b.select(slice(rows - 1, None)))
        if len(x.mask)
    ]
    assert correction_metrics(stages, total(parts)) == pytest.approx(whole, rel=1e-6, abs=1e-6)


def packed(b):
    """The same sequences one after the other, each with another number of filling tokens."""
    tokens = b.mask.shape[1]
    lengths = [max(1, tokens - row % 3) for row in range(len(b.mask))]
    for row, length in enumerate(lengths):
        b.mask[row, length:] = False
    where = [(row, slice(0, length)) for row, length in enumerate(lengths)]
    flat = {
        name: torch.cat([x[row, part] for row, part in where])
        for name, x in vars(b).items()
        if name != "advantages"
    }
    return replace(b, **flat), torch.tensor([0, *lengths]).cumsum(0), where


@every_list
@some_batches
@fast
def test_packed_and_padded_batches_give_the_same(make_batch, stages, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    p, cu_seqlens, where = packed(b)
    b.mask[0, 0] = p.mask[0] = True
    padded_fix = correct(stages, b.old, b.rollout, b.mask)
    fix = correct(stages, p.old, p.rollout, p.mask, cu_seqlens=cu_seqlens)
    assert torch.equal(fix.kept, torch.cat([padded_fix.kept[row, part] for row, part in where]))
    expected = torch.cat([padded_fix.weights[row, part] for row, part in where])
    torch.testing.assert_close(fix.weights, expected)
    assert fix.metrics() == pytest.approx(padded_fix.metrics(), rel=1e-6, abs=1e-6)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), room=st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_sequences_without_tokens_make_no_difference_to_the_parts(lengths, room):
    lengths = [*lengths, 3]
    g = torch.Generator().manual_seed(sum(lengths))
    old = -torch.rand(sum(lengths), generator=g)
    rollout = (old + 0.1 * torch.randn(sum(lengths), generator=g)).clamp(max=0)
    mask, bounds = torch.ones_like(old).bool(), torch.tensor([0, *lengths]).cumsum(0)
    stages = [Reject(level="seq_mean", low=0.9, high=1.2), TIS(level="sequence", cap=1.1)]
    whole = correct(stages, old, rollout, mask, cu_seqlens=bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8rl.correction.layout.PART_TOKENS", room)
        parts = correct(stages, old, rollout, mask, cu_seqlens=bounds)
    assert torch.equal(parts.weights, whole.weights) and torch.equal(parts.kept, whole.kept)
    assert parts.metrics() == pytest.approx(whole.metrics(), rel=1e-6, abs=1e-6)


@every_list
def test_parts_that_fit_the_caches_give_what_one_part_gives(make_batch, stages, monkeypatch):
    b = make_batch(1, rows=37, tokens=23)
    p, cu_seqlens, _ = packed(b)
    whole = correct(stages, b.old, b.rollout, b.mask)
    whole_packed = correct(stages, p.old, p.rollout, p.mask, cu_seqlens=cu_seqlens)
    monkeypatch.setattr("fp8rl.correction.layout.PART_TOKENS", 64)
    parts = correct(stages, b.old, b.rollout, b.mask)
    parts_packed = correct(stages, p.old, p.rollout, p.mask, cu_seqlens=cu_seqlens)
    for one, other in ((whole, parts), (whole_packed, parts_packed)):
        assert torch.equal(one.weights, other.weights) and torch.equal(one.kept, other.kept)
        assert other.metrics() == pytest.approx(one.metrics(), rel=1e-6, abs=1e-6)
