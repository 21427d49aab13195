"""Exact expectations: every outcome of a small problem is enumerated, nothing is sampled.

One row for each outcome, its advantage being `p_rollout(outcome) * reward` and the denominator 1:
the loss's gradient is then the expected gradient under the rollout policy.
"""

import itertools

import pytest
import torch

from fp8rl.correction import MIS, TIS, Counts, IcePop, PPOClip, correct, policy_loss

REWARDS = torch.tensor([1.0, 0.2, -0.5, 2.0], dtype=torch.float64)
ROLLOUT = torch.tensor([0.40, 0.30, 0.25, 0.05], dtype=torch.float64)
LOGITS = torch.tensor([0.1, -0.9, 0.4, 0.7], dtype=torch.float64)


def estimate(stages, logits, log_policy, tokens, rollout_logprobs, rewards):
    """Expected ascent direction of the corrected loss on fully enumerated rows [N, T]."""
    logits = logits.clone().requires_grad_()
    new = log_policy(logits, tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    old = new.detach()
    c = correct(stages, old, rollout_logprobs, mask)
    expected_reward = rollout_logprobs.sum(dim=1).exp() * rewards
    counts = Counts(1, 1)
    out = policy_loss(PPOClip(), new, old, expected_reward, c.weights, c.kept, counts=counts)
    out.loss.backward()
    return -logits.grad


def bandit(*stages):
    tokens = torch.arange(4)[:, None]
    return estimate(
        stages, LOGITS, lambda x, t: x.log_softmax(0)[t], tokens, ROLLOUT.log()[:, None], REWARDS
    )


def score_sum(mass):
    """sum_a mass(a) * R(a) * grad log pi(a), the form that every estimate here has."""
    policy = LOGITS.softmax(0)
    scores = torch.eye(4, dtype=torch.float64) - policy  # [action, logit]
    return (mass * REWARDS) @ scores


POLICY = LOGITS.softmax(0)
EXACT = score_sum(POLICY)


def test_the_closed_form_is_the_gradient_of_the_expected_reward():
    logits = LOGITS.clone().requires_grad_()
    (logits.softmax(0) @ REWARDS).backward()
    torch.testing.assert_close(EXACT, logits.grad)


def test_untruncated_weights_give_the_exact_policy_gradient():
    torch.testing.assert_close(bandit(TIS(cap=1e6)), EXACT, rtol=0, atol=1e-6)


def test_without_correction_the_gradient_is_missed_by_most_of_its_length():
    off = bandit()
    torch.testing.assert_close(off, score_sum(ROLLOUT))
    assert (off - EXACT).norm() > 0.5 * EXACT.norm()


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0, 4.0])
def test_the_bias_of_tis_is_the_mass_it_truncates(cap):
    bias = bandit(TIS(cap=cap)) - EXACT
    lost = (POLICY - cap * ROLLOUT).clamp(min=0)
    assert lost.any()
    torch.testing.assert_close(bias, -score_sum(lost), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.3, 1.5), (0.0, 5.0)])
def test_the_bias_of_mis_is_the_mass_it_rejects(low, high):
    ratio = POLICY / ROLLOUT
    lost = torch.where((ratio < low) | (ratio > high), POLICY, 0.0)
    assert lost.any()
    for stage in (MIS(low=low, high=high), IcePop(low=low, high=high)):
        bias = bandit(stage) - EXACT
        torch.testing.assert_close(bias, -score_sum(lost), rtol=0, atol=1e-6)


def chain(*stages):
    """Two tokens of a Markov chain over three states; reward of the whole sequence."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, generator=g, dtype=torch.float64)  # row 3: the start state
    behaviour = logits + 0.7 * torch.randn(4, 3, generator=g, dtype=torch.float64)
    tokens = torch.tensor(list(itertools.product(range(3), repeat=2)))
    rewards = torch.randn(9, generator=g, dtype=torch.float64)

    def log_policy(x, t):
        before = torch.cat([torch.full_like(t[:, :1], 3), t[:, :1]], dim=1)
        return x.log_softmax(1)[before, t]

    exact = logits.clone().requires_grad_()
    (log_policy(exact, tokens).sum(dim=1).exp() @ rewards).backward()
    got = estimate(stages, logits, log_policy, tokens, log_policy(behaviour, tokens), rewards)
    return got, exact.grad


def test_on_a_chain_sequence_weights_are_exact_and_token_weights_are_nearer_than_none():
    exact_estimate, exact = chain(TIS(level="sequence", cap=1e6))
    torch.testing.assert_close(exact_estimate, exact, rtol=0, atol=1e-6)
    miss = {
        name: ((chain(*stages)[0] - exact).norm() / exact.norm()).item()
        for name, stages in [("token", [TIS(cap=1e6)]), ("off", [])]
    }
    assert 0.01 < miss["token"] < miss["off"]
