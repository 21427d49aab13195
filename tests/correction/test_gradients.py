"""Every loss with every aggregation against a plain loop, finite differences and closed forms."""

import math

import pytest
import torch

from fp8rl.correction import PPOClip, Reinforce, policy_loss
from tests.correction.loss_cases import KINDS, LOSSES, make, name, packed, plain_loop

every_loss = pytest.mark.parametrize("config", LOSSES, ids=name)
LENGTHS = [7, 3, 5, 1]


def in_float64(make_batch, seed, per_sequence=False):
    """A batch in fp64 with weights, a sequence rejected whole, and padding behind LENGTHS."""
    b = make_batch(seed)
    g = torch.Generator().manual_seed(seed)
    shape = b.mask.shape if not per_sequence else (len(b.mask), 1)
    b.new, b.old = b.new.double(), b.old.double()
    b.advantages = torch.randn(shape, generator=g, dtype=torch.float64).expand(b.mask.shape)
    weights = (2 * torch.rand(shape, generator=g, dtype=torch.float64)).expand(b.mask.shape)
    b.mask &= torch.arange(b.mask.shape[1]) < torch.tensor(LENGTHS)[:, None]
    b.mask[2] = False
    return b, weights


def loss_and_gradient(config, new, *rest, **kwargs):
    new = new.detach().clone().requires_grad_()
    out = policy_loss(config, new, *rest, **kwargs)
    out.loss.backward()
    return out.loss.item(), new.grad


@every_loss
def test_every_loss_is_the_plain_loop_over_tokens(make_batch, config):
    clipped = 0
    for seed in range(10):
        b, weights = in_float64(make_batch, seed)
        given = (b.new, b.old, b.advantages, weights, b.mask)
        expected, slope = plain_loop(config, *given)
        loss, gradient = loss_and_gradient(config, *given)
        assert loss == pytest.approx(expected, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-14)
        bounds, flat = packed(LENGTHS, *given)
        loss, gradient = loss_and_gradient(config, *flat, cu_seqlens=bounds)
        assert loss == pytest.approx(expected, rel=1e-12, abs=1e-14)
        torch.testing.assert_close(gradient, packed(LENGTHS, slope)[1][0], rtol=1e-12, atol=1e-14)
        clipped += int((slope[b.mask] == 0).sum())
    assert (clipped > 0) == (config.kind in ("ppo_clip", "gspo")), "the clips were not met"


@pytest.mark.parametrize(
    "config",
    # CISPO's value is not what its gradient is of: see the next test
    [c for c in LOSSES if c.kind != "cispo"],
    ids=name,
)
def test_gradcheck(make_batch, config):
    edges = [0.8, 1.28, 1.5, 0.95, 1.04]
    checked = 0
    for seed in range(6):
        # GSPO's stopped gradients cancel where a sequence has one advantage and one weight
        b, weights = in_float64(make_batch, seed, per_sequence=config.kind == "gspo")
        lr = torch.where(b.mask, b.new - b.old, 0.0)
        ratios = torch.cat([lr.flatten(), lr.sum(1) / b.mask.sum(1).clamp(min=1)]).exp()
        if (ratios[:, None] - torch.tensor(edges)).abs().amin() < 1e-5:
            continue  # a kink within the finite difference would make the check void
        given = (b.old, b.advantages, weights, b.mask)
        new = b.new.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, g=given: policy_loss(config, x, *g).loss, new)
        checked += 1
    assert checked >= 4


@pytest.mark.parametrize("config", [c for c in LOSSES if c.kind == "cispo"], ids=name)
def test_cispo_is_reinforce_weighted_by_the_clipped_ratio(make_batch, config):
    b, weights = in_float64(make_batch, 1)
    clipped = (b.new - b.old).exp().clamp(1 - config.clip_low, 1 + config.clip_high)
    reinforce = make("reinforce", config.aggregation)
    loss, gradient = loss_and_gradient(config, b.new, b.old, b.advantages, weights, b.mask)
    given = (b.new, b.old, b.advantages, weights * clipped, b.mask)
    expected, expected_gradient = loss_and_gradient(reinforce, *given)
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient)


@every_loss
def test_identical_policies_give_exactly_the_plain_policy_gradient(make_batch, config):
    for seed in range(10):
        b, _ = in_float64(make_batch, seed)
        ones = torch.ones_like(b.new)
        plain = Reinforce(aggregation=config.aggregation, max_tokens=config.max_tokens)
        _, expected = loss_and_gradient(plain, b.old, b.old, b.advantages, ones, b.mask)
        _, gradient = loss_and_gradient(config, b.old, b.old, b.advantages, ones, b.mask)
        assert torch.equal(gradient, expected)


@every_loss
def test_with_old_taken_from_new_gradient_flows_through_new_alone(make_batch, config):
    b = make_batch(2)
    weights = b.mask.float()
    new = b.leaf()
    policy_loss(config, new, new, b.advantages, weights, b.mask).loss.backward()
    _, expected = loss_and_gradient(config, b.new, b.new, b.advantages, weights, b.mask)
    assert torch.equal(new.grad, expected) and new.grad.any()


@every_loss
def test_no_gradient_reaches_the_other_tensors(make_batch, config):
    b = make_batch(1)
    others = [x.clone().requires_grad_() for x in (b.old, b.advantages, b.old.exp())]
    policy_loss(config, b.leaf(), *others, b.mask).loss.backward()
    assert all(x.grad is None for x in others)


@every_loss
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_log_ratio_of_a_thousand_stays_finite(config, advantage):
    new = torch.tensor([[-1000.0, 0.0, -1000.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1000.0, 0.0]])
    ones = torch.ones(1, 3)
    out = policy_loss(config, new, old, torch.tensor([advantage]), ones, ones.bool())
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


def test_gspo_survives_log_probs_whose_sum_overflows():
    huge = torch.tensor([[-3e38, -3e38, 0.0, 0.0]])
    ones = torch.ones(1, 4)
    config = make("gspo", "token-mean")
    out = policy_loss(config, huge, huge.flip(1), torch.ones(1), ones, ones.bool())
    assert out.loss == -1.0 and out.metrics["policy/ratio_mean"] == 1.0


def test_beyond_the_largest_ratio_there_is_no_gradient():
    new = torch.tensor([[-1.0, -60.0]], requires_grad=True)
    old = torch.tensor([[-60.0, -1.0]])
    ones = torch.ones(1, 2)
    out = policy_loss(PPOClip(), new, old, -torch.ones(1), ones, ones.bool())
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert not gradient.any()
    assert out.metrics["policy/ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_entirely_masked_batch_gives_zero_loss_and_zero_gradient(make_batch, config, poison):
    b = make_batch(0)
    bad, none = torch.full_like(b.new, poison), torch.zeros_like(b.mask)
    loss, gradient = loss_and_gradient(config, bad, bad, bad, bad, none)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(b.new))


def test_every_kind_is_among_the_losses():
    assert {c.kind for c in LOSSES} == {"ppo_clip", "gspo", "cispo", "reinforce"}
    assert len(LOSSES) == 4 * len(KINDS)
