"""slime's hook: lists of samples in, the loss of each token and new masks out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8rl.correction import TIS, BatchNormalize, Reject, ShapeError, correct
from fp8rl.integrations.slime import tis_function

LENGTHS = [3, 5, 2]
STAGES = [TIS(cap=1.5), Reject(divergence="k2", level="seq_max", high=0.1)]


def samples() -> dict[str, Any]:
    """A micro-batch as slime's policy loss hands it over."""
    generator = torch.Generator().manual_seed(0)
    rollout = [-torch.rand(n, generator=generator) - 0.5 for n in LENGTHS]
    train = [(x + 0.5 * torch.randn(len(x), generator=generator)).clamp(max=0) for x in rollout]
    masks = [torch.ones(n, dtype=torch.int) for n in LENGTHS]
    masks[1][0] = 0
    return {
        "pg_loss": torch.randn(sum(LENGTHS), generator=generator).requires_grad_(),
        "train_log_probs": train,
        "rollout_log_probs": rollout,
        "loss_masks": masks,
        "total_lengths": [n + 4 for n in LENGTHS],
        "response_lengths": LENGTHS,
    }


def test_each_sample_is_corrected_as_if_it_were_alone() -> None:
    given = samples()
    loss, masks, logged = tis_function(STAGES)(object(), **given)
    start = 0
    for n, train, rollout, mask, new in zip(
        LENGTHS, given["train_log_probs"], given["rollout_log_probs"], given["loss_masks"], masks,
        strict=True,
    ):  # fmt: skip
        alone = correct(STAGES, train[None], rollout[None], mask.bool()[None])
        assert torch.equal(new, alone.kept[0].to(mask.dtype))
        expected = given["pg_loss"][start : start + n] * alone.weights[0]
        torch.testing.assert_close(loss[start : start + n], expected)
        start += n
    assert sum(int(mask.sum()) for mask in masks) < sum(LENGTHS) - 1
    assert {len(value) for value in logged.values()} == {sum(LENGTHS)}
    assert loss.requires_grad


def test_a_loss_that_is_nan_where_nothing_is_kept_stays_out() -> None:
    given = samples()
    clean, masks, _ = tis_function(STAGES)(object(), **given)
    left = torch.cat(masks).bool()
    given["pg_loss"] = given["pg_loss"].detach().masked_fill(~left, torch.nan)
    loss = tis_function(STAGES)(object(), **given)[0]
    assert torch.equal(loss, clean)


def test_parts_of_samples_are_refused() -> None:
    given = samples() | {"pg_loss": torch.zeros(6)}
    with pytest.raises(ShapeError, match="context parallelism"):
        tis_function(STAGES)(object(), **given)


def test_a_mean_over_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_normalize"):
        tis_function([TIS(), BatchNormalize()])
