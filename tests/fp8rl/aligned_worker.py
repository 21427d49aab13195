"""One trainer rank of test_trainer_aligned.py, started by torchrun: OUT_DIR TP.

Writes which weights its linears compute with, and on rank 0 what the publisher sends.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.config.file import parse_config
from fp8rl.quant import QuantPlan
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from fp8rl.trainer.megatron_model import hf_config
from tests.sync.test_publisher import Recorder

VOCAB = 64
SHAPE = {  # on two ranks, each holds two groups of two query heads, and one block of the rest
    "num_layers": 1, "hidden_size": 256, "ffn_hidden_size": 256, "num_heads": 8, "num_kv_heads": 4
}  # fmt: skip


def main(out: Path, tp: int) -> None:
    torch.set_num_threads(1)
    trainer = {"precision": "fp8-aligned", "tensor_parallel": tp}
    config = parse_config({"model": SHAPE, "trainer": trainer, "rollout": {"precision": "fp8"}})
    with init_distributed(config) as rank:
        plan = QuantPlan.from_hf_config(hf_config(config.model, VOCAB, 64))
        aligned = MegatronTrainer(config, VOCAB, plan)
        for parameter in aligned._model.decoder.layers.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(unevenness(len(parameter)))
        recorder = Recorder()
        with Publisher(plan, recorder if rank == 0 else None) as publisher:
            publisher.publish(aligned.source(), version=0, kv_scales=None)
        save_file(computed_with(aligned._model, rank, tp), out / f"rank-{rank}.safetensors")
        if rank == 0:
            save_file(recorder.tensors, out / "sent.safetensors")


def unevenness(rows: int) -> Tensor:
    """The factors of rows: 1, 1/4, 1/256, 1/256, 1/4, 1, .. for runs of 64 rows, the heads.

    What shares a block with a larger head loses its small values.
    """
    run = torch.arange(rows) // 64
    return (4.0 ** -(run * run % 5)).to(torch.bfloat16)[:, None]


@torch.no_grad()
def computed_with(model: Any, rank: int, ranks: int) -> dict[str, Tensor]:
    """The weight of each linear of layer 0, this rank's shard [N, K]: its output for unit rows."""
    layer, found = model.decoder.layers[0], {}
    for name, linear in {
        "linear_qkv": layer.self_attention.linear_qkv,
        "linear_proj": layer.self_attention.linear_proj,
        "linear_fc1": layer.mlp.linear_fc1,
        "linear_fc2": layer.mlp.linear_fc2,
    }.items():
        columns = linear.weight.shape[1]
        units = torch.eye(columns, dtype=torch.bfloat16)
        if name in ("linear_proj", "linear_fc2"):  # its output is summed over ranks: take turns
            units = torch.cat([units if r == rank else 0 * units for r in range(ranks)])
        with cpu_stands_in():
            output, _ = linear(units[:, None])
        whole = output[:, 0].T.contiguous()
        found[name] = whole.chunk(ranks, 1)[rank].contiguous() if len(units) > columns else whole
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
