"""What veRL's engines divide by, on a mini-batch as its trainers make it, before and after."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.engine.base import BaseEngine
from verl.workers.utils.losses import ppo_loss

from tests.integrations.verl.own import actor, batch


class Recorder(BaseEngine):
    """An engine whose training sees what veRL's would count; the base class does the rest."""

    def __init__(self, group: Any = None) -> None:
        self._group = group

    def get_data_parallel_group(self) -> Any:
        return self._group

    def optimizer_zero_grad(self) -> None: ...

    def optimizer_step(self) -> float:
        return 0.0

    def is_mp_src_rank_with_outputs(self) -> bool:
        return False

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool) -> Any:
        tokens = data["loss_mask"].sum()  # as veRL's engines do
        if self._group is not None:
            dist.all_reduce(tokens, group=self._group)
        sequences = tu.get_non_tensor_data(data, "global_batch_size", None)
        return {"tokens": int(tokens), "sequences": sequences}


class LossOf(Recorder):
    """An engine whose loss is that of one micro-batch with this output of a model."""

    def __init__(self, output: dict[str, Tensor]) -> None:
        super().__init__()
        self._output = output

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool) -> Any:
        tokens = int(data["loss_mask"].sum())
        tu.assign_non_tensor(data, batch_num_tokens=tokens, dp_size=1)
        return loss_function(model_output=self._output, data=data)


def mini_batch(before: Tensor, after: Tensor, nested: bool, sequences: int | None) -> TensorDict:
    """`before` is the mask when the rollout came, `after` what rejection left of it."""
    fields = {"loss_mask": before, "response_mask": after}
    if nested:  # the v1 trainer's
        fields = {
            name: torch.nested.as_nested_tensor(list(mask), layout=torch.jagged)
            for name, mask in fields.items()
        }
    data = TensorDict(fields, batch_size=len(before))
    if sequences is not None:
        tu.assign_non_tensor(data, global_batch_size=sequences)
    return data


def masks() -> tuple[Tensor, Tensor]:
    """A mask, and one without some tokens and without one sequence."""
    before = batch()[2]
    after = before.clone()
    after[0], after[1, 0] = 0, 0
    return before, after


@pytest.mark.parametrize("nested", [False, True])
def test_rejected_tokens_and_sequences_leave_the_denominators(nested: bool) -> None:
    before, after = masks()
    data = mini_batch(before, after, nested, sequences=len(before))
    found = Recorder().train_batch(data, None)
    assert found == {"tokens": int(after.sum()), "sequences": len(before) - 1}
    assert int(before.sum()) > int(after.sum())


def test_nothing_rejected_changes_nothing() -> None:
    before, _ = masks()
    data = mini_batch(before, before, False, sequences=len(before))
    expected = {"tokens": int(before.sum()), "sequences": len(before)}
    assert Recorder().train_batch(data, None) == expected


def test_what_veRL_does_not_count_is_left_alone() -> None:
    before, after = masks()
    data = mini_batch(before, after, False, sequences=None)
    assert Recorder().train_batch(data, None)["sequences"] is None
    sft = TensorDict({"loss_mask": before}, batch_size=len(before))
    assert Recorder().train_batch(sft, None)["tokens"] == int(before.sum())


def test_a_batch_that_is_rejected_whole_keeps_what_it_had() -> None:
    before, _ = masks()
    data = mini_batch(before, torch.zeros_like(before), False, sequences=len(before))
    expected = {"tokens": int(before.sum()), "sequences": len(before)}
    assert Recorder().train_batch(data, None) == expected


@pytest.mark.parametrize("loss_mode", ["vanilla", "fp8rl_ppo_clip"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_loss_entropy_and_kl_of_a_batch_that_is_rejected_whole_are_zero(
    loss_mode: str, aggregation: str
) -> None:
    old, ref, before = batch()
    rows, tokens = before.shape
    data = mini_batch(before, torch.zeros_like(before), False, sequences=rows)
    data.update({
        "prompts": torch.ones(rows, 1, dtype=torch.long),
        "responses": torch.ones(rows, tokens, dtype=torch.long),
        "attention_mask": torch.ones(rows, 1 + tokens, dtype=torch.long),
        "old_log_probs": old,
        "ref_log_prob": ref,
        "advantages": torch.ones(rows, tokens),
    })  # fmt: skip
    config = actor(
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
        loss_agg_mode=aggregation, use_kl_loss=True, entropy_coeff=0.1,
    )  # fmt: skip
    packed = torch.cat([old, torch.zeros(rows, 1)], dim=1).flatten()
    output = {"log_probs": packed, "entropy": -packed}
    loss, metrics = LossOf(output).train_batch(data, functools.partial(ppo_loss, config))
    assert float(loss) == 0
    found = {name: metric.aggregate() for name, metric in metrics.items() if name != "kl_coef"}
    assert set(found) >= {"actor/pg_loss", "actor/entropy_loss", "kl_loss"}
    assert set(found.values()) == {0.0}


def one_rank(rank: int, address: str, queue: Any) -> None:
    import verl  # noqa: F401

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    before, after = masks()
    rows = slice(0, 3) if rank == 0 else slice(3, 6)
    data = mini_batch(before[rows], after[rows], True, sequences=6)
    queue.put(Recorder(dist.group.WORLD).train_batch(data, None))
    dist.destroy_process_group()


def test_all_ranks_count_together(tmp_path: Any) -> None:
    context = mp.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path}/meet"
    ranks = [context.Process(target=one_rank, args=(r, address, queue)) for r in range(2)]
    for rank in ranks:
        rank.start()
    found = [queue.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    _, after = masks()
    assert found == [{"tokens": int(after.sum()), "sequences": 5}] * 2
