"""What veRL's losses divide by: tokens, and sequences, that are still in the loss.

veRL counts a mini-batch before it trains on it: tokens from `loss_mask`, sequences from the
configuration. In its v1 trainer `loss_mask` is a copy of `response_mask` from before rejection, so
rejected tokens stay in the denominator (veRL issue 4852), and a sequence rejected whole is counted
in every trainer. Here, at the one place where a whole mini-batch is at hand and every rank of the
data-parallel group is on its way, both are made to agree with `response_mask`:

    loss_mask = response_mask      global_batch_size = sequences with a token left, over all ranks

That is exact under gradient accumulation and data parallelism, for veRL's own losses too, and
changes nothing where no token was rejected and no sequence was empty. Where no token is left at all
it changes nothing either: the loss is 0 whatever it is divided by, but by 0 it would be NaN. It
cannot help in bypass mode, where rejection happens within the loss: `losses.py`.

Megatron's loss of multi-token prediction is taken over `loss_mask`, so that rejected tokens leave
that loss too, unless all are.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from fp8rl.integrations.verl.places import missing


def count_what_is_left(data: Any, group: dist.ProcessGroup | None) -> None:
    """Make a mini-batch's denominators those of its `response_mask`; a collective of `group`.

    Args:
        data: veRL's TensorDict of a mini-batch; without `response_mask` (SFT) nothing changes.
        group: the data-parallel group, or None.
    """
    from verl.utils import tensordict_utils

    if "response_mask" not in data or "loss_mask" not in data:
        return
    mask = data["response_mask"]
    rows = mask.unbind() if mask.is_nested else mask
    tokens = torch.stack([row.count_nonzero() for row in rows])
    left = torch.stack([tokens.sum(), tokens.count_nonzero()])
    left = left.to(torch.accelerator.current_accelerator(check_available=True) or mask.device)
    if group is not None:
        dist.all_reduce(left, group=group)
    if not left[0]:  # the loss is 0, and must not be divided by it
        return
    data["loss_mask"] = mask
    if tensordict_utils.get_non_tensor_data(data, "global_batch_size", None) is not None:
        tensordict_utils.assign_non_tensor(data, global_batch_size=int(left[1]))


def install(base: ModuleType) -> None:
    """Have every engine count before it trains a mini-batch."""
    engine = getattr(base, "BaseEngine", None)
    train_batch = getattr(engine, "train_batch", None)
    if engine is None or train_batch is None:
        missing("verl.workers.engine.base.BaseEngine.train_batch")
        return

    @functools.wraps(train_batch)
    def counted(self: Any, data: Any, loss_function: Any) -> Any:
        count_what_is_left(data, self.get_data_parallel_group())
        return train_batch(self, data, loss_function)

    engine.train_batch = counted
