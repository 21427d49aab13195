"""slime's hook `--custom-tis-function-path`, served by fp8rl's correction.

    # my_correction.py
    tis = tis_function([Reject(divergence="k3", level="seq_mean", high=0.01), TIS(cap=2.0)])

    --use-tis --custom-tis-function-path my_correction.tis

slime calls it in every micro-batch with lists of one tensor for each sample, and expects the policy
loss of each token, weighted, the loss masks without what was rejected, and numbers for each token
to log. What the loss is divided by is slime's: older ones count the new masks, newer ones the masks
from before. Left out, and refused: context parallelism, where a rank has only parts of a sample;
stages that need the mean of a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fp8rl.correction import BatchNormalize, ESSMixing, ShapeError, Stage, correct

Result = tuple[Tensor, list[Tensor], dict[str, Tensor]]


def tis_function(stages: Sequence[Stage]) -> Callable[..., Result]:
    """Make the function for slime; ValueError for stages that need a whole batch."""
    for stage in stages:
        if isinstance(stage, BatchNormalize | ESSMixing):
            raise ValueError(
                f"{stage.kind}: needs the mean of a whole batch, and slime corrects micro-batches"
            )

    def tis(
        args: Any,
        *,
        pg_loss: Float[Tensor, " tokens"],
        train_log_probs: list[Tensor],
        rollout_log_probs: list[Tensor],
        loss_masks: list[Tensor],
        **_: Any,
    ) -> Result:
        """Weigh `pg_loss` and take rejected tokens out of the masks.

        Raises:
            ShapeError: samples are cut over ranks, or the lists do not fit together.
        """
        lengths = [len(mask) for mask in loss_masks]
        packed = [torch.cat(each) for each in (train_log_probs, rollout_log_probs, loss_masks)]
        train, rollout, mask = packed
        if not len(train) == len(rollout) == len(mask) == len(pg_loss):
            raise ShapeError(
                f"pg_loss: {len(pg_loss)} tokens, log-probs {len(train)} and {len(rollout)}, masks "
                f"{len(mask)}; with context parallelism a rank has parts of samples only, which "
                "cannot be corrected"
            )
        bounds = torch.tensor([0, *accumulate(lengths)], device=pg_loss.device)
        found = correct(stages, train, rollout, mask.bool(), cu_seqlens=bounds)
        kept = torch.split(found.kept.to(mask.dtype), lengths)
        logged = {"fp8rl_weights": found.weights, "fp8rl_kept": found.kept.float()}
        # a NaN where nothing is kept would outlive its weight of 0
        return pg_loss.masked_fill(~found.kept, 0) * found.weights, list(kept), logged

    return tis
