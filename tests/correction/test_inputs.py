"""Bad input ends in one error that names the tensor."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fp8rl.correction import (
    MIS,
    TIS,
    CorrectionConfig,
    LogProbError,
    MaskError,
    NoCorrection,
    PolicyLossConfig,
    ShapeError,
    ValueRangeError,
    correct,
    mismatch_metrics,
    policy_loss,
)

pytestmark = pytest.mark.usefixtures("annotations_unchecked")


def loss(b, **changes):
    given = {
        "logprobs": b.new,
        "old_logprobs": b.old,
        "advantages": b.advantages,
        "weights": b.mask.float(),
        "mask": b.mask,
    } | changes
    return policy_loss(PolicyLossConfig(), **given)


def poisoned(x, mask, value):
    row, column = mask.nonzero()[3].tolist()
    x = x.clone()
    x[row, column] = value
    return x, rf"{value} at \[{row}, {column}\]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
def test_unmasked_log_probs_that_are_none_are_refused_by_name_and_place(make_batch, value):
    b = make_batch(0)
    bad, where = poisoned(b.old, b.mask, value)
    for call, name in [
        (lambda: correct(TIS(), bad, b.rollout, b.mask), "train_logprobs"),
        (lambda: correct(NoCorrection(), b.old, bad, b.mask), "rollout_logprobs"),
        (lambda: mismatch_metrics(b.old, bad, b.mask), "rollout_logprobs"),
        (lambda: loss(b, logprobs=bad), "logprobs"),
        (lambda: loss(b, old_logprobs=bad), "old_logprobs"),
    ]:
        with pytest.raises(LogProbError, match=rf"^{name}: 1 unusable.*{where}"):
            call()


def test_a_log_prob_positive_by_rounding_is_accepted(make_batch):
    b = make_batch(0)
    fix = correct(TIS(), torch.full_like(b.old, 5e-5), b.rollout, b.mask)
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
        correct(TIS(), b.old, b.rollout[:, 1:], b.mask)
    with pytest.raises(ShapeError, match=r"^old_logprobs: shape \[1, 7\]"):
        loss(b, old_logprobs=b.old[:1])  # would broadcast
    with pytest.raises(ShapeError, match=r"^advantages: shape \[7\]"):
        loss(b, advantages=torch.zeros(7))
    with pytest.raises(ShapeError, match=r"^weights: dtype torch.int64"):
        loss(b, weights=b.mask.long())
    with pytest.raises(ShapeError, match=r"^denominator: shape \[2\]"):
        loss(b, denominator=torch.ones(2))


def test_the_mask_is_a_bool_matrix(make_batch):
    b = make_batch(0)
    for bad, found in [
        (b.mask.float(), "dtype torch.float32"),
        (b.mask[0], r"shape \[7\]"),
        (b.mask[:, :0], r"shape \[4, 0\]"),
    ]:
        with pytest.raises(MaskError, match=rf"^mask: {found}"):
            correct(TIS(), b.old, b.rollout, bad)


@pytest.mark.parametrize("denominator", [0, -3.0, math.nan, math.inf])
def test_the_denominator_of_kept_tokens_is_a_positive_number(make_batch, denominator):
    with pytest.raises(ValueRangeError, match="denominator: "):
        loss(make_batch(0), denominator=denominator)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"kind": "tis", "cap": 0}, "cap"),
        ({"kind": "tis", "cap": -1.0}, "cap"),
        ({"kind": "tis", "cap": math.nan}, "cap"),
        ({"kind": "tis", "cap": math.inf}, "cap"),
        ({"kind": "tis", "level": "word"}, "level"),
        ({"kind": "tis", "low": 0.5}, "low"),
        ({"kind": "none", "cap": 2.0}, "cap"),
        ({"kind": "mis", "low": 2.0, "high": 0.5}, "low must be below high"),
        ({"kind": "mis", "low": 1.0, "high": 1.0}, "low must be below high"),
        ({"kind": "mis", "low": -0.1}, "low"),
        ({"kind": "tiss"}, "tiss"),
        ({}, "kind"),
    ],
)
def test_bad_configuration_is_refused(given, complaint):
    with pytest.raises(ValidationError, match=complaint):
        TypeAdapter(CorrectionConfig).validate_python(given)


@pytest.mark.parametrize("bad", [{"clip_low": 1.0}, {"clip_high": -0.1}, {"clip": 0.2}])
def test_bad_clip_range_is_refused(bad):
    with pytest.raises(ValidationError):
        PolicyLossConfig(**bad)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kind": "none"}, NoCorrection()),
        ({"kind": "tis"}, TIS(level="token", cap=2.0)),
        ({"kind": "mis", "level": "geometric"}, MIS(level="geometric", low=0.5, high=2.0)),
    ],
)
def test_variants_are_told_apart_by_kind_and_are_frozen(given, expected):
    got = TypeAdapter(CorrectionConfig).validate_python(given)
    assert got == expected
    with pytest.raises(ValidationError, match="frozen"):
        got.kind = "other"
