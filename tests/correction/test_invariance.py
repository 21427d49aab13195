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
    NoCorrection,
    PolicyLossConfig,
    correct,
    correction_metrics,
    mismatch_metrics,
    mismatch_sums,
    policy_loss,
)

CONFIGS = [
    NoCorrection(),
    TIS(cap=1.3),
    TIS(level="sequence"),
    TIS(level="geometric", cap=1.1),
    MIS(),
    MIS(level="sequence", low=0.1, high=10),
    MIS(level="geometric", low=0.8, high=1.2),
]
every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.kind}-{getattr(c, 'level', '')}"
)
some_batches = given(seed=st.integers(0, 2**32), rows=st.integers(2, 6), tokens=st.integers(1, 9))
fast = settings(deadline=None, max_examples=25)


def loss_and_grad(b, config, denominator=None):
    new = b.leaf()
    c = correct(config, b.old, b.rollout, b.mask)
    out = policy_loss(
        PolicyLossConfig(),
        new,
        b.old,
        b.advantages,
        c.weights,
        c.kept,
        denominator=denominator,
    )
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


@every_config
@some_batches
@fast
def test_permuting_the_batch_permutes_the_gradient(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss, grad, _ = loss_and_grad(b, config)
    loss_permuted, grad_permuted, _ = loss_and_grad(b.select(order), config)
    torch.testing.assert_close(loss_permuted, loss)
    assert torch.equal(grad_permuted, grad[order])


@every_config
@some_batches
@fast
def test_micro_batches_with_the_global_denominator_add_up(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    loss, grad, metrics = loss_and_grad(b, config)
    kept = correct(config, b.old, b.rollout, b.mask).kept.sum()
    parts = [
        loss_and_grad(b.select(rows), config, denominator=kept)
        for rows in (slice(0, 1), slice(1, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)
    for name, value in metrics.items():
        if name != "policy/ratio_max":
            torch.testing.assert_close(parts[0][2][name] + parts[1][2][name], value)


@every_config
@some_batches
@fast
def test_padding_further_changes_nothing(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    wide = padded(b, columns=5, filler=-1.0)
    loss, grad, _ = loss_and_grad(b, config)
    loss_wide, grad_wide, _ = loss_and_grad(wide, config)
    torch.testing.assert_close(loss_wide, loss)
    torch.testing.assert_close(grad_wide[:, :tokens], grad)
    assert not grad_wide[:, tokens:].any()


@every_config
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 123.0])
@given(seed=st.integers(0, 2**32))
@fast
def test_what_stands_at_masked_positions_is_never_read(make_batch, config, poison, seed):
    b = make_batch(seed)
    b.mask[0] = False  # a row of padding alone, whose advantage may be poisoned too
    b.mask[1, 0] = True
    b.advantages = b.advantages[:, None].expand_as(b.mask).clone()
    p = replace(
        b,
        **{name: torch.where(b.mask, x, poison) for name, x in vars(b).items() if name != "mask"},
    )
    loss, grad, metrics = loss_and_grad(b, config)
    loss_poisoned, grad_poisoned, metrics_poisoned = loss_and_grad(p, config)
    assert torch.equal(loss_poisoned, loss)
    assert torch.equal(grad_poisoned, grad)
    assert not grad_poisoned[~b.mask].any()
    assert metrics_poisoned == metrics
    clean, dirty = (correct(config, x.old, x.rollout, x.mask) for x in (b, p))
    assert torch.equal(clean.weights, dirty.weights) and torch.equal(clean.kept, dirty.kept)
    assert mismatch_metrics(p.old, p.rollout, p.mask) == mismatch_metrics(b.old, b.rollout, b.mask)
    assert correction_metrics(config, dirty, p.mask) == correction_metrics(config, clean, b.mask)


def test_poison_at_a_masked_row_of_per_sequence_advantages_and_in_weights_is_not_read(make_batch):
    b = make_batch(0)
    b.mask[0] = False
    new, weights = b.leaf(), torch.where(b.mask, 1.0, math.nan)
    b.advantages[0] = math.nan
    out = policy_loss(PolicyLossConfig(), new, b.old, b.advantages, weights, b.mask)
    out.loss.backward()
    assert out.loss.isfinite() and new.grad.isfinite().all() and not new.grad[0].any()


@some_batches
@fast
def test_sums_of_micro_batches_give_the_metrics_of_the_whole(make_batch, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    b.mask[0, 0] = True
    b.mask[-1] = False  # a micro-batch may hold no token at all
    whole = mismatch_metrics(b.old, b.rollout, b.mask)
    parts = [
        mismatch_sums(x.old, x.rollout, x.mask)
        for x in (b.select(slice(0, 1)), b.select(slice(1, -1)), b.select(slice(rows - 1, None)))
        if len(x.mask)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert total.metrics() == pytest.approx(whole, abs=1e-7)
