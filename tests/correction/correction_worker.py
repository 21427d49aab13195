"""One of two ranks, each with half of a batch; rank 0 writes what both found together."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fp8rl.correction import (
    MIS,
    BatchNormalize,
    ESSMixing,
    PPOClip,
    by_position,
    correct,
    count,
    group_metrics,
    policy_loss,
)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2
    )
    batch = torch.load(folder / "batch.pt", weights_only=True)
    rows = slice(0, 3) if rank == 0 else slice(3, None)
    mine = {name: x[rows] for name, x in batch.items()}
    stages = [MIS(low=0.3, high=3.0), BatchNormalize(level="sequence"), ESSMixing(target=0.9)]
    tensors = mine["old"], mine["rollout"], mine["mask"]
    fix = correct(stages, *tensors, group=dist.group.WORLD)
    new = mine["new"].requires_grad_()
    loss_config = PPOClip(aggregation="seq-mean-token-mean")
    counts = count(fix.kept, group=dist.group.WORLD)
    advantages = mine["advantages"]
    loss = policy_loss(
        loss_config, new, mine["old"], advantages, fix.weights, fix.kept, counts=counts
    ).loss
    loss.backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    groups = by_position(mine["mask"], [2, 4])
    found = {
        "loss": summed.item(),
        "metrics": fix.metrics(dist.group.WORLD),
        "groups": group_metrics(groups, *tensors, dist.group.WORLD),
    }
    torch.save({"weights": fix.weights, "grad": new.grad}, folder / f"rank{rank}.pt")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
