"""Well-mastered positive tokens leave the loss while entropy is low (UloRL)."""

import math

import pytest
import torch

from fp8rl.correction import (
    LogProbError,
    MasteredTokens,
    PPOClip,
    ShapeError,
    ValueRangeError,
    count,
    drop_mastered,
    policy_loss,
)
from tests.correction.loss_cases import packed

RULE = MasteredTokens(probability=0.9, entropy=0.5)
OLD = torch.tensor([[0.95, 0.89, 0.91], [0.99, 0.2, 0.99]]).log()
POSITIVE_FIRST = torch.tensor([1.0, -1.0])
KEPT = torch.tensor([[True, True, True], [True, True, False]])
LEFT = torch.tensor([[False, True, False], [True, True, False]])


@pytest.mark.parametrize("entropy", [0.49, torch.tensor(0.49), 0.0])
def test_positive_tokens_that_are_all_but_certain_are_dropped(entropy):
    assert torch.equal(drop_mastered(RULE, OLD, POSITIVE_FIRST, KEPT, entropy), LEFT)


@pytest.mark.parametrize("entropy", [0.5, torch.tensor(0.7)])
def test_nothing_is_dropped_while_entropy_is_at_its_target(entropy):
    assert torch.equal(drop_mastered(RULE, OLD, POSITIVE_FIRST, KEPT, entropy), KEPT)


def test_advantages_of_tokens_and_packed_batches_give_the_same():
    per_token = POSITIVE_FIRST[:, None].expand(2, 3)
    assert torch.equal(drop_mastered(RULE, OLD, per_token, KEPT, 0.1), LEFT)
    bounds, (old, kept, left) = packed([3, 2], OLD, KEPT, LEFT)
    found = drop_mastered(RULE, old, POSITIVE_FIRST, kept, 0.1, cu_seqlens=bounds)
    assert torch.equal(found, left)


def test_dropped_tokens_are_in_no_sum_and_no_denominator():
    """Counted after dropping, micro-batches add up to the loss without the dropped tokens."""
    kept = drop_mastered(RULE, OLD, POSITIVE_FIRST, KEPT, 0.1)
    counts = count(kept)
    assert int(counts.tokens) == 3
    ones = torch.ones(2, 3)
    parts = [
        policy_loss(
            PPOClip(),
            OLD[i : i + 1],
            OLD[i : i + 1],
            POSITIVE_FIRST[i : i + 1],
            ones[:1],
            kept[i : i + 1],
            counts=counts,
        ).loss
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx((-1 + 1 + 1) / 3)


def test_what_stands_at_masked_positions_is_never_read():
    old = torch.where(KEPT, OLD, math.nan)
    assert torch.equal(drop_mastered(RULE, old, POSITIVE_FIRST, KEPT, 0.1), LEFT)


@pytest.mark.usefixtures("annotations_unchecked")
def test_bad_input_is_refused_by_name():
    for entropy in (math.nan, math.inf, torch.tensor(math.nan)):
        with pytest.raises(ValueRangeError, match=r"^entropy: "):
            drop_mastered(RULE, OLD, POSITIVE_FIRST, KEPT, entropy)
    with pytest.raises(ShapeError, match=r"^entropy: shape \[2, 3\]"):
        drop_mastered(RULE, OLD, POSITIVE_FIRST, KEPT, OLD)
    with pytest.raises(ShapeError, match=r"^advantages: shape \[3\]"):
        drop_mastered(RULE, OLD, torch.ones(3), KEPT, 0.1)
    with pytest.raises(LogProbError, match=r"^old_logprobs: "):
        drop_mastered(RULE, -OLD, POSITIVE_FIRST, KEPT, 0.1)
