import math

import pytest
import torch

from fp8rl.correction import MIS, TIS, NoCorrection, PolicyLossConfig, correct, policy_loss

CLIP = PolicyLossConfig(clip_low=0.2, clip_high=0.28)


def run(b, correction, **kwargs):
    """Loss, gradient and metrics of batch `b` under correction config `correction`."""
    new = b.leaf()
    c = correct(correction, b.old, b.rollout, b.mask)
    out = policy_loss(CLIP, new, b.old, b.advantages, c.weights, c.kept, **kwargs)
    out.loss.backward()
    return out.loss.detach(), new.grad, out.metrics


def plain_grpo(b):
    """GRPO's clipped token-mean loss as papers write it, without any of our code."""
    new = b.leaf()
    rho = (new - b.old).exp()
    adv = b.advantages[:, None].expand_as(rho)
    terms = -torch.minimum(rho * adv, rho.clamp(0.8, 1.28) * adv)
    loss = terms[b.mask].sum() / b.mask.sum()
    loss.backward()
    return loss.detach(), new.grad


def single(ratio, advantage, weight=1.0):
    new = torch.tensor([[math.log(ratio) - 2]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1)
    out = policy_loss(
        CLIP, new, -2 * ones.double(), torch.tensor([advantage]), weight * ones, ones.bool()
    )
    out.loss.backward()
    return out.loss.item(), new.grad.item(), {k: v.item() for k, v in out.metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "clipped"),
    [
        (1.0, 2.0, 1.0, None),
        (1.25, 2.0, 1.25, None),
        (1.30, 2.0, 1.28, "high"),
        (0.5, 2.0, 0.5, None),
        (0.7, -2.0, 0.8, "low"),
        (0.9, -2.0, 0.9, None),
        (3.0, -2.0, 3.0, None),
    ],
)
def test_clip_higher_in_every_region(ratio, advantage, surrogate, clipped):
    loss, grad, metrics = single(ratio, advantage, weight=0.5)
    assert loss == pytest.approx(-0.5 * surrogate * advantage)
    assert grad == pytest.approx(0.0 if clipped else -0.5 * ratio * advantage)
    assert metrics["policy/clip_fraction_high"] == (clipped == "high")
    assert metrics["policy/clip_fraction_low"] == (clipped == "low")
    assert metrics["policy/ratio_mean"] == pytest.approx(ratio)
    assert metrics["policy/ratio_max"] == pytest.approx(ratio)


def test_metrics_are_over_kept_tokens():
    new = torch.tensor([[0.1, 0.2, 0.3, 0.6]]).log()
    old = torch.tensor([[0.2, 0.2, 0.2, 0.2]]).log()
    kept = torch.tensor([[True, True, True, False]])
    out = policy_loss(CLIP, new, old, torch.ones(1), torch.ones(1, 4), kept)
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(
        {
            "policy/clip_fraction_high": 1 / 3,
            "policy/clip_fraction_low": 0,
            "policy/ratio_mean": 1.0,
            "policy/ratio_max": 1.5,
        }
    )


def test_the_uncorrected_loss_is_plain_grpo(make_batch):
    for seed in range(20):
        b = make_batch(seed)
        loss, grad, _ = run(b, NoCorrection())
        expected_loss, expected_grad = plain_grpo(b)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    "correction", [TIS(), TIS(level="sequence"), MIS(), MIS(level="geometric")]
)
def test_with_equal_log_probs_the_corrected_loss_is_the_plain_one_bit_for_bit(
    make_batch, correction
):
    for seed in range(20):
        b = make_batch(seed, mismatch=0.0)
        assert torch.equal(b.rollout, b.old)
        plain_loss, plain_grad, _ = run(b, NoCorrection())
        loss, grad, _ = run(b, correction)
        assert torch.equal(loss, plain_loss)
        assert torch.equal(grad, plain_grad)


def test_correction_off_and_tis_differ_exactly_where_the_ratio_is_not_one(make_batch):
    b = make_batch(3)
    same = torch.arange(b.mask.shape[1]) % 2 == 0
    b.rollout = torch.where(same, b.old, b.old - 0.3)
    b.new = b.old.clone()  # on policy: nothing is clipped, every gradient is non-zero
    _, off, _ = run(b, NoCorrection())
    _, on, _ = run(b, TIS(cap=2.0))
    assert torch.equal(on != off, b.mask & ~same)
    torch.testing.assert_close(on[:, ~same], off[:, ~same] * math.exp(0.3))


def test_each_gradient_is_the_plain_one_times_the_truncated_ratio(make_batch):
    b = make_batch(5)
    _, off, _ = run(b, NoCorrection())
    _, on, _ = run(b, TIS(cap=1.5))
    truncated = (b.old - b.rollout).exp().clamp(max=1.5)
    torch.testing.assert_close(on, off * truncated)
    assert (truncated == 1.5)[b.mask].any() and (truncated < 1.5)[b.mask].any()


def test_rejected_tokens_leave_the_denominator(make_batch):
    b = make_batch(7)
    correction = MIS(low=0.7, high=1.4)
    kept = correct(correction, b.old, b.rollout, b.mask).kept
    assert 0 < kept.sum() < b.mask.sum()
    loss, grad, _ = run(b, correction)
    b.mask = kept  # as if the rejected tokens had been masked from the start
    loss_without, grad_without, _ = run(b, correction)
    assert torch.equal(loss, loss_without)
    assert torch.equal(grad, grad_without)


@pytest.mark.parametrize("denominator", [None, 5.0, 0, torch.tensor(0)])
def test_an_entirely_masked_batch_gives_zero_loss_and_zero_gradient(make_batch, denominator):
    b = make_batch(0)
    b.mask = torch.zeros_like(b.mask)
    b.new.fill_(math.nan)
    loss, grad, metrics = run(b, TIS(), denominator=denominator)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(v == 0 for v in metrics.values())


def test_gradient_reaches_the_new_policy_alone(make_batch):
    b = make_batch(1)
    new = b.leaf()
    others = [x.clone().requires_grad_() for x in (b.old, b.advantages, b.old.exp())]
    policy_loss(CLIP, new, *others, b.mask).loss.backward()
    assert new.grad is not None
    assert all(x.grad is None for x in others)


def test_on_policy_with_old_taken_from_new_the_gradient_is_reinforce(make_batch):
    b = make_batch(2)
    new = b.leaf()
    policy_loss(CLIP, new, new, b.advantages, b.mask.float(), b.mask).loss.backward()
    expected = -b.advantages[:, None] * b.mask / b.mask.sum()
    torch.testing.assert_close(new.grad, expected)


def test_a_log_ratio_of_a_thousand_stays_finite():
    new = torch.tensor([[-1000.0, 0.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1000.0]])
    for advantage in (-1.0, 1.0):
        ones = torch.ones(1, 2)
        out = policy_loss(CLIP, new, old, torch.tensor([advantage]), ones, ones.bool())
        (grad,) = torch.autograd.grad(out.loss, new)
        assert out.loss.isfinite() and grad.isfinite().all()


def test_bf16_log_probs_are_computed_in_fp32(make_batch):
    b = make_batch(4)
    kept = correct(TIS(), b.old.bfloat16(), b.rollout.bfloat16(), b.mask)
    old = b.old.bfloat16()
    out = policy_loss(CLIP, old, old, b.advantages, kept.weights, kept.kept)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("advantage_shape", ["batch", "batch tokens"])
def test_gradcheck_in_float64(make_batch, advantage_shape):
    for seed in range(5):
        b = make_batch(seed)
        advantages = b.advantages.double()
        if advantage_shape == "batch tokens":
            advantages = advantages[:, None] + torch.linspace(-1, 1, b.mask.shape[1])
        c = correct(TIS(), b.old, b.rollout, b.mask)
        edges = torch.tensor([0.8, 1.28]).log()
        margin = ((b.new - b.old)[..., None] - edges).abs().amin()
        assert margin > 1e-5, "a kink within the finite difference would make the check void"

        def loss(new, b=b, c=c, advantages=advantages):
            return policy_loss(CLIP, new, b.old.double(), advantages, c.weights, c.kept).loss

        assert torch.autograd.gradcheck(loss, b.new.double().requires_grad_())
