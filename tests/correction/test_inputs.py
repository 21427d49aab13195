"""Bad input ends in one error that names the tensor."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fp8rl.correction import (
    MIS,
    TIS,
    BatchNormalize,
    CorrectionConfig,
    Counts,
    ESSMixing,
    LogProbError,
    LossConfig,
    MaskError,
    MasteredTokens,
    PPOClip,
    Reinforce,
    ShapeError,
    ValueRangeError,
    by_age,
    check_bypass,
    correct,
    drop_mastered,
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
        ([{"kind": "icepop"}, {"kind": "ess_mixing"}], "give back a weight to what icepop set"),
        ([{"kind": "veto", "floor": 1e-9}], "floor"),
        ([{"kind": "mis", "low": 1e-10}], "below 1e-08, which no ratio is; use 0"),
        ([{"kind": "reject", "low": 0.0, "high": 1e9}], "high"),
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


@pytest.mark.parametrize("stage", [BatchNormalize(), ESSMixing()])
def test_bypass_mode_has_no_mean_of_a_batch(stage):
    config = CorrectionConfig(mode="bypass", stages=[TIS(), stage])
    with pytest.raises(ValueError, match=f"bypass: {stage.kind} needs the mean of a whole batch"):
        check_bypass(config, Reinforce())


@pytest.mark.parametrize("preset", ["tis", ["tis"], 3, None])
def test_a_preset_that_is_none_is_refused_with_those_there_are(preset):
    with pytest.raises(ValidationError, match="is not one of disabled, decoupled_token_is"):
        CorrectionConfig.model_validate({"preset": preset})
    with pytest.raises(ValidationError, match="is not one of grpo, dapo"):
        TypeAdapter(LossConfig).validate_python({"preset": preset})


def test_groups_of_a_mask_that_is_none_or_of_another_shape_are_refused(make_batch):
    b = make_batch(0)
    ages = by_age(torch.zeros_like(b.mask, dtype=torch.int64), 1)
    with pytest.raises(MaskError, match=r"^mask: torch\.float32"):
        group_metrics(ages, b.old, b.rollout, b.mask.float())
    narrow = by_age(torch.zeros(7, dtype=torch.int64), 1)
    with pytest.raises(MaskError, match=r"index \[7\]"):
        group_metrics(narrow, b.old, b.rollout, b.mask)


def test_where_a_value_cannot_be_refused_at_once_groups_and_mastered_tokens_do_not_hide_it(
    make_batch, monkeypatch
):
    b = make_batch(0)
    row, column = b.mask.nonzero()[3].tolist()
    bad, too_certain = b.rollout.clone(), b.old.clone()
    bad[row, column], too_certain[row, column] = math.nan, 5.0
    ages = by_age(torch.zeros_like(b.mask, dtype=torch.int64), 1)
    for module in ("checks", "mastered"):  # as on CUDA
        monkeypatch.setattr(f"fp8rl.correction.{module}.waits", lambda _: True)
    with pytest.raises(LogProbError, match="NaN, infinite or positive"):
        group_metrics(ages, b.old, bad, b.mask)
    rule, ones = MasteredTokens(probability=0.9, entropy=9.0), torch.ones(len(b.mask))
    kept = drop_mastered(rule, too_certain, ones, b.mask, 0.1)
    assert kept[row, column], "it stays, and the loss is NaN"


def test_records_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TIS().cap = 3.0
