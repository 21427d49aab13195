"""How losses are averaged, and that parts of a batch add up to the whole, on one rank or more."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.correction import Counts, Reinforce, ShapeError, ValueRangeError, count, policy_loss
from tests.correction.loss_cases import LOSSES, make, name, packed
from tests.correction.ranks import on_ranks

every_loss = pytest.mark.parametrize("config", LOSSES, ids=name)
any_loss_and_batch = given(
    config=st.sampled_from(LOSSES),
    seed=st.integers(0, 2**32),
    rows=st.integers(2, 6),
    tokens=st.integers(1, 9),
)
fast = settings(deadline=None, max_examples=100)

# three sequences: 2 tokens kept, 1 kept, none kept; the values of kept tokens are 1, 2 and 5
VALUES = torch.tensor([[-1.0, -2.0, -9.0], [-5.0, -9.0, -9.0], [-9.0, -9.0, -9.0]])
KEPT = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", 8 / 3),
        ("seq-mean-token-mean", (1.5 + 5) / 2),
        ("seq-mean-token-sum", 8 / 2),
        ("seq-mean-token-sum-norm", 8 / (2 * 11)),
    ],
)
def test_each_aggregation_divides_by_what_its_name_says(aggregation, expected):
    config = make("reinforce", aggregation)
    ones = torch.ones(3, 3)
    out = policy_loss(config, VALUES, VALUES, torch.ones(3), ones, KEPT)
    assert out.loss.item() == pytest.approx(expected)
    bounds, (values, flat_ones, kept) = packed([3, 2, 1], VALUES, ones, KEPT)
    out = policy_loss(config, values, values, torch.ones(3), flat_ones, kept, cu_seqlens=bounds)
    assert out.loss.item() == pytest.approx(expected)


def test_counts_are_of_kept_tokens_and_of_sequences_that_have_one():
    counts = count(KEPT)
    assert (int(counts.tokens), int(counts.sequences)) == (3, 2)
    bounds, (kept,) = packed([3, 2, 1], KEPT)
    counts = count(kept, cu_seqlens=bounds)
    assert (int(counts.tokens), int(counts.sequences)) == (3, 2)


def in_parts(b, config, cuts, counts):
    """Loss, gradient and metrics of runs of rows, added up, and the parts' own counts."""
    new = b.leaf()
    loss, metrics, own = 0.0, {}, None
    for start, end in zip([0, *cuts], [*cuts, len(b.mask)], strict=True):
        rows = slice(start, end)
        part = b.select(rows)
        out = policy_loss(
            config,
            new[rows],
            part.old,
            part.advantages,
            part.rollout.exp(),
            part.mask,
            counts=counts,
        )
        out.loss.backward()
        loss = loss + out.loss.detach()
        own = out.counts if own is None else own + out.counts
        for key, value in out.metrics.items():
            seen = metrics.get(key, torch.zeros(()))
            metrics[key] = torch.maximum(seen, value) if key.endswith("_max") else seen + value
    return loss, new.grad, metrics, own


@any_loss_and_batch
@fast
def test_micro_batches_with_the_counts_of_the_whole_add_up(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    loss, grad, metrics, _ = in_parts(b, config, [], None)
    parts = in_parts(b, config, [1], count(b.mask))
    torch.testing.assert_close(parts[0], loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts[1], grad)
    for key, value in metrics.items():
        torch.testing.assert_close(parts[2][key], value, atol=1e-6, rtol=1e-5)


@any_loss_and_batch
@fast
def test_sums_taken_first_may_be_divided_later(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    b.mask[0, 0] = True
    loss, grad, metrics, whole = in_parts(b, config, [], None)
    total, sums, shares, counts = in_parts(b, config, [1], Counts(1, 1))
    assert int(counts.tokens) == int(whole.tokens) == int(b.mask.sum())
    assert int(counts.sequences) == int(b.mask.any(1).sum())
    divisor = counts.divisor(config.aggregation)
    torch.testing.assert_close(total / divisor, loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sums / divisor, grad)
    kl = shares["actor/ppo_kl"] / counts.tokens
    torch.testing.assert_close(kl, metrics["actor/ppo_kl"], atol=1e-6, rtol=1e-5)


@any_loss_and_batch
@fast
def test_permuting_the_batch_permutes_the_gradient(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss, grad, _, _ = in_parts(b, config, [], None)
    loss_permuted, grad_permuted, _, _ = in_parts(b.select(order), config, [], None)
    torch.testing.assert_close(loss_permuted, loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad_permuted, grad[order], atol=1e-7, rtol=1e-6)


@any_loss_and_batch
@fast
def test_padding_further_or_packing_changes_nothing(make_batch, config, seed, rows, tokens):
    b = make_batch(seed, rows, tokens)
    weights = b.rollout.exp()
    loss, grad, metrics, _ = in_parts(b, config, [], None)

    wide = [torch.nn.functional.pad(x, (0, 5), value=-1.0) for x in (b.new, b.old, weights)]
    wide[0].requires_grad_()
    out = policy_loss(
        config, *wide[:2], b.advantages, wide[2], torch.nn.functional.pad(b.mask, (0, 5))
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(wide[0].grad[:, :tokens], grad)
    assert not wide[0].grad[:, tokens:].any()

    lengths = [tokens - i % tokens for i in range(rows)]  # what lies beyond is masked from now on
    b.mask &= torch.arange(tokens) < torch.tensor(lengths)[:, None]
    loss, grad, metrics, _ = in_parts(b, config, [], None)
    bounds, (new, old, weight, kept, grad) = packed(lengths, b.new, b.old, weights, b.mask, grad)
    new.requires_grad_()
    out = policy_loss(config, new, old, b.advantages, weight, kept, cu_seqlens=bounds)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(new.grad, grad, atol=1e-7, rtol=1e-5)
    for key, value in metrics.items():
        torch.testing.assert_close(out.metrics[key], value, atol=1e-6, rtol=1e-5)


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 123.0])
def test_what_stands_at_masked_positions_is_never_read(make_batch, config, poison):
    b = make_batch(0)
    b.mask[0] = False  # a row of padding alone, whose advantage may be poisoned too
    bad = replace(
        b,
        **{k: torch.where(b.mask, getattr(b, k), poison) for k in ("new", "old", "rollout")},
        advantages=torch.where(b.mask.any(1), b.advantages, poison),
    )
    clean, dirty = in_parts(b, config, [], None), in_parts(bad, config, [], None)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert clean[2] == dirty[2]
    assert not dirty[1][~b.mask].any()


@every_loss
def test_ranks_with_counts_over_their_group_add_up(make_batch, config):
    b = make_batch(3)
    b.mask[0] = False  # a rank may have nothing at all
    loss, grad, _, _ = in_parts(b, config, [], None)

    def rank(number, group):
        part = b.select(slice(0, 1) if number == 0 else slice(1, 4))
        return in_parts(part, config, [], count(part.mask, group=group))

    first, second = on_ranks(2, rank)
    torch.testing.assert_close(first[0] + second[0], loss)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), grad)


@pytest.mark.parametrize("tokens", [0, -3.0, math.nan, math.inf, torch.tensor(0)])
def test_a_count_is_a_positive_number_where_something_is_kept(tokens):
    given = (VALUES, VALUES, torch.ones(3), torch.ones(3, 3))
    with pytest.raises(ValueRangeError, match=r"^counts.tokens: "):
        policy_loss(Reinforce(), *given, KEPT, counts=Counts(tokens, 1))
    with pytest.raises(ValueRangeError, match=r"^counts.sequences: "):
        policy_loss(Reinforce(), *given, KEPT, counts=Counts(1, tokens))
    out = policy_loss(Reinforce(), *given, ~KEPT & KEPT, counts=Counts(tokens, 1))
    assert out.loss == 0


def test_a_count_is_one_number():
    given = (VALUES, VALUES, torch.ones(3), torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"^counts.tokens: shape \[2\]"):
        policy_loss(Reinforce(), *given, KEPT, counts=Counts(torch.ones(2), 1))
