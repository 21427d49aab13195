import math

import pytest
import torch

from fp8rl.correction import (
    CISPO,
    GSPO,
    MIS,
    TIS,
    LogProbError,
    MaskError,
    PPOClip,
    Reinforce,
    ShapeError,
    ValueRangeError,
    correct,
    policy_loss,
)

CLIP = PPOClip(clip_low=0.2, clip_high=0.28)


def run(b, stages=(), config=CLIP, **kwargs):
    """Loss, gradient and metrics of batch `b` corrected by `stages`."""
    new = b.leaf()
    c = correct(stages, b.old, b.rollout, b.mask)
    out = policy_loss(config, new, b.old, b.advantages, c.weights, c.kept, **kwargs)
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


def single(ratio, advantage, weight=1.0, config=CLIP):
    new = torch.tensor([[math.log(ratio) - 2]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1)
    out = policy_loss(
        config, new, -2 * ones.double(), torch.tensor([advantage]), weight * ones, ones.bool()
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
    for config in (CLIP, GSPO(clip_low=0.2, clip_high=0.28)):  # of one token GSPO is PPO
        loss, grad, metrics = single(ratio, advantage, weight=0.5, config=config)
        assert loss == pytest.approx(-0.5 * surrogate * advantage)
        assert grad == pytest.approx(0.0 if clipped else -0.5 * ratio * advantage)
        assert metrics["policy/clip_fraction_high"] == (clipped == "high")
        assert metrics["policy/clip_fraction_low"] == (clipped == "low")
        assert metrics["actor/pg_clipfrac"] == (clipped is not None)
        assert metrics["actor/pg_clipfrac_lower"] == 0
        assert metrics["actor/ppo_kl"] == pytest.approx(-math.log(ratio))
        assert metrics["policy/ratio_mean"] == pytest.approx(ratio)
        assert metrics["policy/ratio_max"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "clipped"),
    [(2.9, -2.0, 2.9, False), (3.1, -2.0, 3.0, True), (3.1, 2.0, 1.28, False)],
)
def test_dual_clip_bounds_what_a_negative_token_is_charged(ratio, advantage, surrogate, clipped):
    loss, grad, metrics = single(ratio, advantage, config=PPOClip(dual_clip=3.0))
    assert loss == pytest.approx(-surrogate * advantage)
    assert grad == pytest.approx(-ratio * advantage if ratio == 2.9 else 0.0)
    assert metrics["actor/pg_clipfrac_lower"] == clipped
    assert metrics["policy/clip_fraction_low"] == 0


@pytest.mark.parametrize(
    ("ratio", "factor", "clipped"), [(0.5, 0.8, "low"), (1.1, 1.1, None), (1.3, 1.28, "high")]
)
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_cispo_clips_the_weight_and_keeps_every_gradient(ratio, factor, clipped, advantage):
    config = CISPO(clip_low=0.2, clip_high=0.28)
    loss, grad, metrics = single(ratio, advantage, weight=0.5, config=config)
    assert loss == pytest.approx(-0.5 * factor * advantage * (math.log(ratio) - 2))
    assert grad == pytest.approx(-0.5 * factor * advantage)
    assert metrics["policy/clip_fraction_high"] == (clipped == "high")
    assert metrics["policy/clip_fraction_low"] == (clipped == "low")


def test_reinforce_looks_at_no_ratio():
    loss, grad, metrics = single(7.0, 2.0, weight=0.5, config=Reinforce())
    assert loss == pytest.approx(-(math.log(7) - 2))
    assert grad == pytest.approx(-1.0)
    assert metrics["policy/ratio_mean"] == pytest.approx(7)
    assert metrics["actor/pg_clipfrac"] == 0


def test_gspo_clips_sequences_by_the_geometric_mean_of_kept_ratios():
    lr = torch.tensor([[0.3, -0.1, 9.0], [0.06, 0.06, 0.0]])
    old = torch.full((2, 3), -10.0)
    kept = torch.tensor([[True, True, False], [True, True, True]])
    config = GSPO(clip_low=0.05, clip_high=0.05)
    new = (old + lr).requires_grad_()
    out = policy_loss(config, new, old, torch.ones(2), torch.ones(2, 3), kept)
    out.loss.backward()
    first, second = 1.05, math.exp(0.04)  # exp(0.1) is clipped
    assert out.loss.item() == pytest.approx(-(first + second) / 2, rel=1e-5)
    assert not new.grad[0].any()
    torch.testing.assert_close(new.grad[1], torch.full((3,), -second / 6), rtol=1e-5, atol=0)
    assert out.metrics["policy/clip_fraction_high"].item() == pytest.approx(2 / 5)
    assert out.metrics["policy/ratio_max"].item() == pytest.approx(math.exp(0.1), rel=1e-5)


def test_metrics_are_over_kept_tokens_whatever_the_aggregation():
    new = torch.tensor([[0.1, 0.2, 0.3, 0.6]]).log()
    old = torch.tensor([[0.2, 0.2, 0.2, 0.2]]).log()
    kept = torch.tensor([[True, True, True, False]])
    for how in ("token-mean", "seq-mean-token-sum"):
        config = PPOClip(aggregation=how)
        out = policy_loss(config, new, old, torch.ones(1), torch.ones(1, 4), kept)
        assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(
            {
                "policy/clip_fraction_high": 1 / 3,
                "policy/clip_fraction_low": 0,
                "policy/ratio_mean": 1.0,
                "policy/ratio_max": 1.5,
                "actor/pg_clipfrac": 1 / 3,
                "actor/pg_clipfrac_lower": 0,
                "actor/ppo_kl": -math.log(0.5 * 1.0 * 1.5) / 3,
            }
        )


def test_the_uncorrected_loss_is_plain_grpo(make_batch):
    for seed in range(20):
        b = make_batch(seed)
        loss, grad, _ = run(b)
        expected_loss, expected_grad = plain_grpo(b)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    "stage", [TIS(), TIS(level="sequence"), MIS(), MIS(level="geometric")], ids=repr
)
def test_with_equal_log_probs_the_corrected_loss_is_the_plain_one_bit_for_bit(make_batch, stage):
    for seed in range(20):
        b = make_batch(seed, mismatch=0.0)
        assert torch.equal(b.rollout, b.old)
        plain_loss, plain_grad, _ = run(b)
        loss, grad, _ = run(b, [stage])
        assert torch.equal(loss, plain_loss)
        assert torch.equal(grad, plain_grad)


def test_correction_off_and_tis_differ_exactly_where_the_ratio_is_not_one(make_batch):
    b = make_batch(3)
    same = torch.arange(b.mask.shape[1]) % 2 == 0
    b.rollout = torch.where(same, b.old, b.old - 0.3)
    b.new = b.old.clone()  # on policy: nothing is clipped, every gradient is non-zero
    _, off, _ = run(b)
    _, on, _ = run(b, [TIS(cap=2.0)])
    assert torch.equal(on != off, b.mask & ~same)
    torch.testing.assert_close(on[:, ~same], off[:, ~same] * math.exp(0.3))


def test_each_gradient_is_the_plain_one_times_the_truncated_ratio(make_batch):
    b = make_batch(5)
    _, off, _ = run(b)
    _, on, _ = run(b, [TIS(cap=1.5)])
    truncated = (b.old - b.rollout).exp().clamp(max=1.5)
    torch.testing.assert_close(on, off * truncated)
    assert (truncated == 1.5)[b.mask].any() and (truncated < 1.5)[b.mask].any()


def test_rejected_tokens_leave_the_denominator(make_batch):
    b = make_batch(7)
    correction = [MIS(low=0.7, high=1.4)]
    kept = correct(correction, b.old, b.rollout, b.mask).kept
    assert 0 < kept.sum() < b.mask.sum()
    loss, grad, _ = run(b, correction)
    b.mask = kept  # as if the rejected tokens had been masked from the start
    loss_without, grad_without, _ = run(b, correction)
    assert torch.equal(loss, loss_without)
    assert torch.equal(grad, grad_without)


def test_on_policy_with_old_taken_from_new_the_gradient_is_reinforce(make_batch):
    b = make_batch(2)
    new = b.leaf()
    policy_loss(CLIP, new, new, b.advantages, b.mask.float(), b.mask).loss.backward()
    expected = -b.advantages[:, None] * b.mask / b.mask.sum()
    torch.testing.assert_close(new.grad, expected)


def test_bf16_log_probs_are_computed_in_fp32(make_batch):
    b = make_batch(4)
    c = correct([TIS()], b.old.bfloat16(), b.rollout.bfloat16(), b.mask)
    old = b.old.bfloat16()
    out = policy_loss(CLIP, old, old, b.advantages, c.weights, c.kept)
    assert out.loss.dtype == torch.float32
    expected = policy_loss(CLIP, old.float(), old.float(), b.advantages, c.weights, c.kept)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.usefixtures("annotations_unchecked")
class TestBadInput:
    """One clear error that names the tensor."""

    def loss(self, b, **changes):
        given = {
            "logprobs": b.new,
            "old_logprobs": b.old,
            "advantages": b.advantages,
            "weights": b.mask.float(),
            "kept": b.mask,
        } | changes
        return policy_loss(CLIP, **given)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5])
    @pytest.mark.parametrize("name", ["logprobs", "old_logprobs"])
    def test_log_probs_that_are_none(self, make_batch, name, value):
        b = make_batch(0)
        row, column = b.mask.nonzero()[3].tolist()
        bad = b.old.clone()
        bad[row, column] = value
        with pytest.raises(
            LogProbError, match=rf"^{name}: 1 unus.* {value} at \[{row}, {column}\]"
        ):
            self.loss(b, **{name: bad})

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("name", ["advantages", "weights"])
    def test_factors_that_are_not_finite(self, make_batch, name, value):
        b = make_batch(0)
        row, column = b.mask.nonzero()[3].tolist()
        bad = b.old.clone()
        bad[row, column] = value
        with pytest.raises(ValueRangeError, match=rf"^{name}: 1 unus.* {value} at \[{row}, "):
            self.loss(b, **{name: bad})

    def test_shapes_and_dtypes_that_do_not_fit(self, make_batch):
        b = make_batch(0)
        for name, bad, found in [
            ("old_logprobs", b.old[:1], r"shape \[1, 7\], expected \[4, 7\]"),  # would broadcast
            ("logprobs", b.new[:, 1:], r"shape \[4, 6\], expected \[4, 7\]"),
            ("advantages", torch.zeros(7), r"shape \[7\], expected one for each of the 4 sequ"),
            ("advantages", torch.zeros(4, 1), r"shape \[4, 1\]"),
            ("weights", b.mask.long(), "dtype torch.int64"),
            ("cu_seqlens", torch.tensor([0, 28]), ""),
        ]:
            with pytest.raises((ShapeError, MaskError), match=rf"^(kept|{name}): {found}"):
                self.loss(b, **{name: bad})
        with pytest.raises(MaskError, match=r"^kept: dtype torch\.float32"):
            self.loss(b, kept=b.mask.float())

    def test_packed_input_needs_one_advantage_for_each_sequence_or_token(self):
        x = -torch.ones(6)
        bounds = torch.tensor([0, 2, 6])
        with pytest.raises(ShapeError, match=r"^advantages: shape \[3\], .* 2 sequences"):
            policy_loss(CLIP, x, x, torch.zeros(3), -x, x.bool(), cu_seqlens=bounds)
