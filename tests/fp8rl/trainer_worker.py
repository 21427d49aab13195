"""One trainer rank of test_trainer_layouts.py, started by torchrun: OUT_DIR TP PP.

Writes what this rank saw, for each family, as files named by both; says nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.quant import KVObserver
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer

VOCAB = 64


def main(out: Path, tp: int, pp: int) -> None:
    torch.set_num_threads(1)
    configs = {
        family: configure({"family": family, "hidden_size": hidden_size}, tp, pp)
        for family, hidden_size in {"qwen3": 128, "qwen2": 256}.items()
    }
    with init_distributed(configs["qwen3"]) as rank:
        for family, config in configs.items():
            found, tensors = step(with_biases(MegatronTrainer(config, VOCAB), tp))
            save_file(tensors, out / f"{family}-{rank}.safetensors")
            (out / f"{family}-{rank}.json").write_text(json.dumps(found))


def configure(model: dict[str, object], tp: int, pp: int) -> RunConfig:
    return parse_config(
        {
            "model": {"num_layers": 4, "ffn_hidden_size": 256, "init_std": 0.1, **model},
            "trainer": {
                "micro_batch_size": 3, "learning_rate": 0.01,
                "tensor_parallel": tp, "pipeline_parallel": pp,
            },
        }
    )  # fmt: skip


def with_biases(trainer: MegatronTrainer, tp: int) -> MegatronTrainer:
    """The trainer with biases that are not zero: for every layer one draw, cut for the ranks."""
    from megatron.core import parallel_state

    state = trainer.state()
    for name in (n for n in state if n.startswith("master/") and n.endswith(".bias")):
        generator = torch.Generator().manual_seed(1)
        whole = torch.randn(len(state[name]) * tp, generator=generator)
        state[name] = whole.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()].clone()
        state[name.replace("master/", "model/")] = state[name].bfloat16()
    trainer.load_state(state)
    return trainer


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
    seen = trainer.observe_kv(batch, KVObserver(trainer.attention_shape, histogram=True))
    tensors["kv_amax"] = seen.amax()
    tensors["kv_percentile"] = seen.percentile(99.0)
    first = trainer.update(batch, loss_fn)
    state = trainer.state()
    second = trainer.update(batch, loss_fn)
    tensors |= {f"end/{n}": t.clone().contiguous() for n, t in trainer.source()}
    trainer.load_state(state)
    again = trainer.update(batch, loss_fn)
    tensors |= {f"again/{n}": t.clone().contiguous() for n, t in trainer.source()}
    return {**first, "tokens": seen.tokens, "resumed": float(second == again)}, tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
