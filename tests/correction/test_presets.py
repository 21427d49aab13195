"""The presets, a compiled correction, and one on a GPU that never waits for the host."""

import subprocess
import sys

import pytest
import torch

from fp8rl.correction import (
    LOSS_PRESETS,
    PRESETS,
    TIS,
    BatchNormalize,
    CorrectionConfig,
    ESSMixing,
    PPOClip,
    Reinforce,
    Reject,
    Veto,
    check_bypass,
    correct,
    policy_loss,
)

STAGES = [Reject(level="seq_mean", low=0.8, high=1.2), Veto(floor=1e-3), TIS(cap=1.5)]


def test_a_preset_by_name_is_its_mode_and_stages():
    config = CorrectionConfig.model_validate({"preset": "bypass_pg_geo_rs_seq_tis"})
    geo = Reject(divergence="k1", level="seq_mean", low=0.999, high=1.001)
    assert config == CorrectionConfig(mode="bypass", stages=(geo, TIS(level="sequence", cap=2.0)))
    assert len(PRESETS) == 19  # as many as veRL 0.9.1 has


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_corrects_a_batch_and_survives_its_own_dump(make_batch, name):
    config = CorrectionConfig.model_validate({"preset": name})
    assert CorrectionConfig.model_validate(config.model_dump()) == config
    check_bypass(config, Reinforce() if "_pg_" in name else PPOClip())
    b = make_batch(0, mismatch=1e-4)
    fix = correct(config.stages, b.old, b.rollout, b.mask)
    assert torch.equal(fix.kept, b.mask), "policies this close are not rejected by any preset"
    torch.testing.assert_close(fix.weights, b.mask.float(), atol=1e-2, rtol=0)


def test_weights_in_a_clipped_loss_of_bypass_mode_would_correct_twice():
    config = CorrectionConfig(mode="bypass", stages=(TIS(),))
    check_bypass(config, Reinforce())
    with pytest.raises(ValueError, match="the weights of tis would correct twice"):
        check_bypass(config, PPOClip())


def test_loss_presets_are_the_published_settings():
    assert LOSS_PRESETS["grpo"] == PPOClip(
        clip_low=0.2, clip_high=0.2, aggregation="seq-mean-token-mean"
    ).model_dump(exclude_defaults=True) | {"kind": "ppo_clip", "clip_high": 0.2}


# In a process of its own: the suite's type checks would be compiled with the room.
COMPILED = """
import math, sys
import torch
from fp8rl.correction import *

g = torch.Generator().manual_seed(0)
old = -torch.rand(6, 16, generator=g) * 5
rollout = (old + 0.3 * torch.randn(6, 16, generator=g)).clamp(max=0)
new, mask = old.clone(), torch.rand(6, 16, generator=g) < 0.7
advantages = torch.randn(6, generator=g)
stages = [Reject(level="seq_mean", low=0.9, high=1.04), Veto(floor=1e-3), TIS(cap=1.5)]
loss = PPOClip()

def both(new, old, rollout, advantages, mask):
    fix = correct(stages, old, rollout, mask)
    out = policy_loss(loss, new, old, advantages, fix.weights, fix.kept)
    return out.loss, fix.weights, fix.kept, fix.statistics.sums

def compiled(function, *given):
    return torch.compile(function, backend=sys.argv[1], fullgraph=True)(*given)

given = new, old, rollout, advantages, mask
for got, expected in zip(compiled(both, *given), both(*given), strict=True):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
assert 0 < both(*given)[2].sum() < mask.sum()

mask[1, 2], rollout[1, 2] = True, math.nan
for refusing in ([TIS()], [MIS()], [Reject(level="token", low=0.5, high=2.0), TIS()]):
    fix = compiled(correct, refusing, old, rollout, mask)
    assert fix.weights[fix.kept].isnan().any()
    try:
        fix.metrics()
    except LogProbError as error:
        assert "rollout_logprobs" in str(error)
    else:
        raise AssertionError("metrics of a NaN")
"""


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_correction_and_loss_compile_to_one_graph_in_which_the_unusable_becomes_nan(backend):
    run = [sys.executable, "-c", COMPILED, backend]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("packed", [False, True])
def test_no_value_is_read_back(packed):
    """Tensors on the meta device have no values: reading one raises."""
    shape = (24,) if packed else (4, 6)
    x, mask = -torch.ones(shape, device="meta"), torch.ones(shape, device="meta").bool()
    bounds = torch.tensor([0, 10, 24], device="meta") if packed else None
    rescaled = [*STAGES, BatchNormalize(level="sequence"), ESSMixing()]
    assert correct(rescaled, x, x, mask, cu_seqlens=bounds).weights.shape == shape


@pytest.mark.gpu
def test_on_a_gpu_correction_and_loss_never_wait_for_the_host(make_batch):
    b = make_batch(2, rows=64, tokens=128)
    given = [x.cuda() for x in (b.leaf(), b.old, b.rollout, b.advantages, b.mask)]
    new, old, rollout, advantages, mask = given
    torch.cuda.set_sync_debug_mode("error")
    try:
        fix = correct(STAGES, old, rollout, mask)
        out = policy_loss(PPOClip(), new, old, advantages, fix.weights, fix.kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = correct(STAGES, b.old, b.rollout, b.mask)
    torch.testing.assert_close(fix.weights.cpu(), expected.weights)
    assert fix.metrics() == pytest.approx(expected.metrics(), rel=1e-5, abs=1e-6)
    assert out.loss.isfinite()
