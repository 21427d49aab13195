"""Two real processes with half a batch each find what one process finds for the whole."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8rl.correction import (
    MIS,
    TIS,
    BatchNormalize,
    ESSMixing,
    LogProbError,
    PPOClip,
    by_position,
    correct,
    group_metrics,
    policy_loss,
)
from tests.correction.ranks import on_ranks

WORKER = Path(__file__).with_name("correction_worker.py")


def test_ranks_together_give_weights_loss_gradient_and_metrics_of_the_whole_batch(
    make_batch, tmp_path
):
    b = make_batch(11, rows=8, tokens=9)
    torch.save(vars(b), tmp_path / "batch.pt")
    command = [sys.executable, str(WORKER)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    halves = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    stages = [MIS(low=0.3, high=3.0), BatchNormalize(level="sequence"), ESSMixing(target=0.9)]
    fix = correct(stages, b.old, b.rollout, b.mask)
    new = b.leaf()
    config = PPOClip(aggregation="seq-mean-token-mean")
    loss = policy_loss(config, new, b.old, b.advantages, fix.weights, fix.kept).loss
    loss.backward()
    torch.testing.assert_close(torch.cat([half["weights"] for half in halves]), fix.weights)
    torch.testing.assert_close(torch.cat([half["grad"] for half in halves]), new.grad)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["metrics"] == pytest.approx(fix.metrics(), rel=1e-6, abs=1e-6)
    groups = by_position(b.mask, [2, 4])
    expected = group_metrics(groups, b.old, b.rollout, b.mask)
    assert found["groups"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_what_one_rank_refuses_no_other_waits_for(make_batch):
    b = make_batch(11, rows=8, tokens=9)
    row, column = b.mask[4:].nonzero()[0].tolist()
    b.rollout[4 + row, column] = math.nan

    def half(rank, group):
        mine = b.select(slice(0, 4) if rank == 0 else slice(4, None))
        with pytest.raises(LogProbError) as refused:
            correct([TIS(), BatchNormalize()], mine.old, mine.rollout, mine.mask, group=group)
        return str(refused.value)

    first, second = on_ranks(2, half)
    assert "another rank's cannot be used" in first
    assert second.startswith("rollout_logprobs: 1 unusable")
