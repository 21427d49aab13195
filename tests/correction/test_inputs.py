"""Bad input ends in one error that names the tensor."""

import math

import pytest
import torch
from pydantic import ValidationError

from fp8rl.correction import (
    MIS,
    TIS,
    CorrectionConfig,
    Counts,
    LogProbError,
    MaskError,
    PPOClip,
    ShapeError,
    ValueRangeError,
    by_age,
    correct,
    group_metrics,
    policy_loss,
)

pytestmark = pytest.mark.usefixtures("annotations_unchecked")


def loss(b, **changes):
    given = {
        "logprobs": b.new,
        "old_logprobs": b.old,
        "advantages": b.advantages,
        "weights": b.mask.float(),
        "kept": b.mask,
    } | changes
    return policy_loss(PPOClip(), **given)


def poisoned(x, mask, value):
    row, column = mask.nonzero()[3].tolist()
    x = x.clone()
    x[row, column] = value
    return x, rf"{value} at \[{row}, {column}\]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
def test_unmasked_log_probs_that_are_none_are_refused_by_name_and_place(make_batch, value):
    b = make_batch(0)
    bad, where = poisoned(b.old, b.mask, value)
    ages = by_age(torch.zeros_like(b.mask, dtype=torch.int64), 1)
    for call, name in [
        (lambda: correct([TIS()], bad, b.rollout, b.mask), "train_logprobs"),
        (lambda: correct([], b.old, bad, b.mask), "rollout_logprobs"),
        (lambda: group_metrics(ages, b.old, bad, b.mask), "rollout_logprobs"),
        (lambda: loss(b, logprobs=bad), "logprobs"),
        (lambda: loss(b, old_logprobs=bad), "old_logprobs"),
    ]:
        with pytest.raises(LogProbError, match=rf"^{name}: 1 unusable.*{where}"):
            call()


def test_a_log_prob_positive_by_rounding_is_accepted(make_batch):
    b = make_batch(0)
    fix = correct([TIS()], torch.full_like(b.old, 5e-5), b.rollout, b.mask)
    assert fix.weights[b.mask.bool()].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unmasked_advantages_and_weights_must_be_finite(make_batch, value):
    b = make_batch(0)
    bad, where = poisoned(b.old, b.mask, value)
    for name in ("advantages", "weights"):
        with pytest.raises(ValueRangeError, match=rf"^{name}: 1 unusable.*{where}"):
            loss(b, **{name: bad})


def test_shapes_must_agree(make_batch):
    b = make_batch(0)
    with pytest.raises(ShapeError, match=r"^rollout_logprobs: shape \[4, 6\], expected \[4, 7\]"):
        correct([TIS()], b.old, b.rollout[:, 1:], b.mask)
    with pytest.raises(ShapeError, match=r"^old_logprobs: shape \[1, 7\]"):
        loss(b, old_logprobs=b.old[:1])  # would broadcast
    with pytest.raises(ShapeError, match=r"^advantages: shape \[7\]"):
        loss(b, advantages=torch.zeros(7))
    with pytest.raises(ShapeError, match=r"^weights: dtype torch.int64"):
        loss(b, weights=b.mask.long())
    with pytest.raises(ShapeError, match=r"^counts.tokens: shape \[2\]"):
        loss(b, counts=Counts(torch.ones(2), 1))


@pytest.mark.parametrize(
    ("bounds", "found"),
    [
        ([0, 3, 9], r"\[0, 3, 9\].*28 tokens"),
        ([1, 3, 28], r"\[1, 3, 28\]"),
        ([0, 9, 3, 28], "ascend"),
        ([28], r"\[1\]"),
        ([0.0, 28.0], "torch.float32"),
    ],
)
def test_cu_seqlens_ascend_from_zero_to_the_tokens(make_batch, bounds, found):
    b = make_batch(0)
    flat = b.old.flatten(), b.rollout.flatten(), b.mask.flatten()
    with pytest.raises(ShapeError, match=rf"^cu_seqlens: .*{found}"):
        correct([TIS()], *flat, cu_seqlens=torch.tensor(bounds))


def test_the_mask_is_a_bool_matrix(make_batch):
    b = make_batch(0)
    for bad, found in [
        (b.mask.float(), "dtype torch.float32"),
        (b.mask[0], r"shape \[7\]"),
        (b.mask[:, :0], r"shape \[4, 0\]"),
    ]:  # a packed mask comes with cu_seqlens
        with pytest.raises(MaskError, match=rf"^mask: {found}"):
            correct([TIS()], b.old, b.rollout, bad)


@pytest.mark.parametrize("tokens", [0, -3.0, math.nan, math.inf])
def test_the_count_of_kept_tokens_is_a_positive_number(make_batch, tokens):
    with pytest.raises(ValueRangeError, match=r"counts\.tokens: "):
        loss(make_batch(0), counts=Counts(tokens, 1))


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ([{"kind": "tis", "cap": 0}], "cap"),
        ([{"kind": "tis", "cap": -1.0}], "cap"),
        ([{"kind": "tis", "cap": math.nan}], "cap"),
        ([{"kind": "tis", "cap": math.inf}], "cap"),
        ([{"kind": "tis", "level": "word"}], "level"),
        ([{"kind": "tis", "low": 0.5}], "low"),
        ([{"kind": "mis", "low": 2.0, "high": 0.5}], "low must be below high"),
        ([{"kind": "icepop", "low": 1.0, "high": 1.0}], "low must be below high"),
        ([{"kind": "mis", "low": -0.1}], "low"),
        ([{"kind": "reject", "divergence": "k3", "low": 0.1, "high": 1}], "k3 is bounded by high"),
        ([{"kind": "reject", "high": 2.0}], "low is missing"),
        ([{"kind": "reject", "low": 3.0, "high": 2.0}], "low must be below high"),
        ([{"kind": "reject", "divergence": "k4", "high": 2.0}], "divergence"),
        ([{"kind": "veto", "floor": 1.5}], "floor"),
        ([{"kind": "ess_mixing", "target": 1.0}], "target"),
        ([{"kind": "tiss"}], "tiss"),
        ([{}], "kind"),
        ([{"kind": "tis"}, {"kind": "mis"}], "tis and mis both give weights"),
        ([{"kind": "batch_normalize"}], "rescales weights, but no tis, mis or icepop"),
        ([{"kind": "tis"}, {"kind": "ess_mixing"}, {"kind": "veto"}], "put veto before it"),
        ([{"kind": "veto"}, {"kind": "veto", "floor": 0.1}], "veto stands twice"),
    ],
)
def test_bad_configuration_is_refused(stages, complaint):
    with pytest.raises(ValidationError, match=complaint):
        CorrectionConfig(stages=stages)


def test_stages_given_to_correct_are_checked_like_those_of_a_config(make_batch):
    b = make_batch(0)
    with pytest.raises(ValueError, match="tis and mis both give weights; keep one of them"):
        correct([TIS(), MIS()], b.old, b.rollout, b.mask)


@pytest.mark.parametrize("bad", [{"clip_low": 1.0}, {"clip_high": -0.1}, {"clip": 0.2}])
def test_bad_clip_range_is_refused(bad):
    with pytest.raises(ValidationError):
        PPOClip(**bad)


def test_records_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TIS().cap = 3.0
