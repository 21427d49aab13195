"""A response cut in segments by three policies: every token counts by the one that wrote it.

A Markov chain writes up to six tokens, two by each version of the policy, each version being some
way from the last, and stops on its own or at six. All 127 responses can be enumerated, and so can
the gradient of the expected reward under the newest version, and what any estimator makes of it.
"""

import functools
import itertools

import pytest
import torch

from fp8rl.correction import TIS, Reinforce, correct, policy_loss

STOP, LENGTH, SEGMENT = 0, 6, 2
BATCHES = 60
UNTRUNCATED = (TIS(level="sequence", cap=1e6),)
LOSS = Reinforce(aggregation="seq-mean-token-sum")


def _drawn_once():
    """Logits [version, token before (the start is STOP's row), token], and rewards by response."""
    g = torch.Generator().manual_seed(5)
    steps = 0.6 * torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    steps[:, :, STOP] -= 0.3
    return steps.cumsum(0), torch.randn(3**LENGTH, generator=g, dtype=torch.float64)


VERSIONS, REWARDS = _drawn_once()
NEWEST = VERSIONS[-1]


def every_response():
    """Tokens [127, LENGTH], STOP behind the end too, and the mask of real ones."""
    rows = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
    stopped = (rows == STOP).cumsum(1)
    rows = rows[((rows == STOP) | (stopped == 0)).all(1)]  # after STOP only STOP
    return rows, real(rows)


def real(tokens):
    """True up to the first STOP."""
    return ((tokens == STOP).cumsum(1) - (tokens == STOP).long()) == 0


def rewards(tokens):
    return REWARDS[tokens @ (3 ** torch.arange(LENGTH))]


def log_probs(logits, tokens):
    before = torch.cat([torch.full_like(tokens[:, :1], STOP), tokens[:, :-1]], dim=1)
    return logits.log_softmax(-1)[before, tokens]


def behaviour(tokens):
    """What each token was sampled with: position by position, the version of its segment."""
    each = torch.stack([log_probs(logits, tokens) for logits in VERSIONS])
    version = torch.arange(LENGTH) // SEGMENT
    return each[version, :, torch.arange(LENGTH)].T


def sampled(count, generator):
    """Responses as a run writes them: segment after segment, each by the version then newest."""
    tokens = torch.full((count, LENGTH), STOP)
    before, open_ = torch.full((count,), STOP), torch.ones(count, dtype=torch.bool)
    for position in range(LENGTH):
        policy = VERSIONS[position // SEGMENT].softmax(-1)[before]
        drawn = torch.multinomial(policy, 1, generator=generator)[:, 0]
        tokens[:, position] = before = torch.where(open_, drawn, STOP)
        open_ &= drawn != STOP
    return tokens


def estimate(tokens, rollout_logprobs, advantages, stages=UNTRUNCATED):
    """The corrected loss's ascent direction at the newest version, [9]."""
    logits, mask = NEWEST.clone().requires_grad_(), real(tokens)
    new = log_probs(logits, tokens)
    c = correct(stages, new.detach(), rollout_logprobs, mask)
    policy_loss(LOSS, new, new.detach(), advantages, c.weights, c.kept).loss.backward()
    return -logits.grad.flatten()


def exact():
    tokens, mask = every_response()
    logits = NEWEST.clone().requires_grad_()
    probability = (log_probs(logits, tokens) * mask).sum(1).exp()
    (probability * rewards(tokens)).sum().backward()
    return logits.grad.flatten()


EXACT = exact()
WRONG = {"the last version wrote everything": VERSIONS[-1], "the first did": VERSIONS[0]}


def expected(rollout_logprobs, stages=UNTRUNCATED):
    """The expectation of `estimate` over what the three versions write."""
    tokens, mask = every_response()
    mass = (behaviour(tokens) * mask).sum(1).exp()
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64))
    # the loss averages over rows, which are not samples here: their mass makes them that
    return estimate(tokens, rollout_logprobs(tokens), len(mass) * mass * rewards(tokens), stages)


def miss(found):
    return ((found - EXACT).norm() / EXACT.norm()).item()


def test_with_each_tokens_own_policy_the_expected_estimate_is_the_exact_gradient():
    torch.testing.assert_close(expected(behaviour), EXACT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("who", WRONG)
def test_as_if_one_version_had_written_everything_it_is_missed_by_more_than_its_length(who):
    assert miss(expected(lambda tokens: log_probs(WRONG[who], tokens))) > 1


def test_token_weights_are_nearer_than_none_and_not_exact():
    token = miss(expected(behaviour, (TIS(level="token", cap=1e6),)))
    assert 0.01 < token < miss(expected(behaviour, ()))


@functools.cache
def batches(rows):
    g = torch.Generator().manual_seed(11)
    return sampled(BATCHES * rows, g).split(rows)


def estimates(rows, rollout_logprobs):
    """One estimate for each sampled batch of so many rows, [BATCHES, 9]."""
    each = [estimate(t, rollout_logprobs(t), rewards(t)) for t in batches(rows)]
    return torch.stack(each)


def standard_errors(found):
    """How many standard errors the mean of estimates is from the exact gradient, [9]."""
    error = found.std(0) / len(found) ** 0.5
    return (found.mean(0) - EXACT).abs() / error.clamp(min=1e-12)


def test_sampled_estimates_converge_to_the_exact_gradient():
    few, many = (estimates(rows, behaviour) for rows in (40, 4000))
    assert standard_errors(few).max() < 4
    assert standard_errors(many).max() < 4
    assert miss(many.mean(0)) < 0.05
    assert many.std(0).norm() < few.std(0).norm() / 7  # 10 in the limit


@pytest.mark.parametrize("who", WRONG)
def test_sampled_estimates_that_assume_one_version_converge_elsewhere(who):
    found = estimates(4000, lambda tokens: log_probs(WRONG[who], tokens))
    assert standard_errors(found).max() > 20
    assert miss(found.mean(0)) > 1
