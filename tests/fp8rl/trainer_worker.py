"""One trainer rank of test_trainer_layouts.py, started by torchrun: OUT_DIR TP PP.

Writes what this rank saw as files named by its rank; says nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config import parse_config
from fp8rl.distributed import init_distributed
from fp8rl.trainer import MegatronTrainer

VOCAB = 64


def main(out: Path, tp: int, pp: int) -> None:
    torch.set_num_threads(1)
    config = parse_config(
        {
            "model": {
                "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "init_std": 0.1
            },
            "trainer": {
                "micro_batch_size": 3, "learning_rate": 0.01,
                "tensor_parallel": tp, "pipeline_parallel": pp,
            },
        }
    )  # fmt: skip
    with init_distributed(config) as rank:
        found, tensors = step(MegatronTrainer(config, VOCAB))
        save_file(tensors, out / f"rank-{rank}.safetensors")
        (out / f"rank-{rank}.json").write_text(json.dumps(found))


def step(trainer: MegatronTrainer) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Export, score, observe and step once; step again from the state saved in between."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (10, 12), generator=generator)
    lengths = torch.randint(6, 13, (10, 1), generator=generator)
    batch = TokenBatch(tokens, (torch.arange(12) >= 4) & (torch.arange(12) < lengths))
    count = batch.response_mask.sum()

    def loss_fn(log_probs: Tensor, rows: slice) -> Tensor:
        return -log_probs.sum() / count

    tensors = {f"start/{n}": t.clone().contiguous() for n, t in trainer.source()}
    tensors["log_probs"] = trainer.log_probs(batch)
    tensors["kv_amax"], seen = trainer.kv_amax(batch, max_tokens=80)
    first = trainer.update(batch, loss_fn)
    state = trainer.state()
    second = trainer.update(batch, loss_fn)
    tensors |= {f"end/{n}": t.clone().contiguous() for n, t in trainer.source()}
    trainer.load_state(state)
    again = trainer.update(batch, loss_fn)
    tensors |= {f"again/{n}": t.clone().contiguous() for n, t in trainer.source()}
    return {**first, "tokens": seen, "resumed": float(second == again)}, tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
