"""One trainer rank of test_moe_layouts.py, started by torchrun: OUT_DIR TP PP EP.

Writes what this rank saw of two models: one whose tokens go to all experts, so that nothing hangs
on ties, and one whose tokens go to two. Rank 0 also writes what it publishes with rounded routers.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.quant import Box, KVObserver, QuantizedTensor, QuantPlan
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import TensorMeta, encoded
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

VOCAB = 64
EXPERTS = 4
MODELS = {"all": EXPERTS, "two": 2}  # experts a token


def main(out: Path, tp: int, pp: int, ep: int) -> None:
    torch.set_num_threads(1)
    with init_distributed(configure("all", tp, pp, ep)) as rank:
        for name in MODELS:
            config = configure(name, tp, pp, ep)
            found, tensors = step(MegatronTrainer(config, VOCAB), config)
            cut = cut_over_ranks(config, rank, tp * pp)
            tensors |= {f"cut/{n}": t.clone() for n, t in cut.items()}
            save_file(tensors, out / f"{name}-{rank}.safetensors")
            (out / f"{name}-{rank}.json").write_text(json.dumps(found))


def configure(model: str, tp: int, pp: int, ep: int) -> RunConfig:
    return parse_config(
        {
            "model": {
                "family": "qwen3_moe", "num_layers": 2, "hidden_size": 128, "init_std": 0.1,
                "num_experts": EXPERTS, "experts_per_token": MODELS[model],
                "moe_ffn_hidden_size": 256,
            },
            "trainer": {
                "micro_batch_size": 3, "learning_rate": 0.01, "grad_clip": 1e9,
                "tensor_parallel": tp, "pipeline_parallel": pp, "expert_parallel": ep,
            },
        }
    )  # fmt: skip


def step(trainer: MegatronTrainer, config: RunConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Export, score, observe and step once; step again from the state saved in between.

    An odd number of tokens is scored, which two ranks cannot divide.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (10, 12), generator=generator)
    lengths = torch.randint(6, 13, (10, 1), generator=generator)
    batch = TokenBatch(tokens, (torch.arange(12) >= 4) & (torch.arange(12) < lengths))
    count = batch.response_mask.sum()

    def loss_fn(log_probs: Tensor, rows: slice) -> Tensor:
        return -log_probs.sum() / count

    tensors = {f"start/{n}": t.clone().contiguous() for n, t in trainer.source()}
    tensors |= {f"rounded/{n}": t for n, t in published(trainer, config).items()}
    tensors["log_probs"] = trainer.log_probs(batch)
    tensors["routes"] = torch.where(batch.real[..., None, None], trainer.observe_routes(batch), -1)
    tensors["kv_amax"] = trainer.observe_kv(batch, KVObserver(trainer.attention_shape)).amax()
    first = trainer.update(batch, loss_fn)
    state = trainer.state()
    moments = {n: t for n, t in state.items() if n.startswith("adam/exp_avg/")}
    tensors |= {named(n, config): 10 * t for n, t in moments.items()}  # the gradient
    second = trainer.update(batch, loss_fn)
    tensors |= {f"end/{n}": t.clone().contiguous() for n, t in trainer.source()}
    trainer.load_state(state)
    again = trainer.update(batch, loss_fn)
    return {**first, "resumed": float(second == again)}, tensors


def named(name: str, config: RunConfig) -> str:
    """The name of a gradient with an expert's number among all."""
    from megatron.core import parallel_state

    first = parallel_state.get_expert_model_parallel_rank() * (
        EXPERTS // config.trainer.expert_parallel
    )
    whole = re.sub(r"experts\.(\d+)", lambda found: f"experts.{first + int(found[1])}", name)
    return whole.replace("adam/exp_avg/", "gradient/")


def published(trainer: MegatronTrainer, config: RunConfig) -> dict[str, Tensor]:
    """The routers that rank 0 would send if the plan rounds them."""
    plan = QuantPlan.from_hf_config(hf_config(config.model, VOCAB, 64), router="fp8-rounded")
    sent = dict(encoded(trainer.source(), plan, to=[0]))
    found = {name: tensor for name, tensor in sent.items() if ".mlp.gate." in name}
    assert not any(isinstance(tensor, QuantizedTensor) for tensor in found.values())
    return {name: t.clone() for name, t in found.items() if isinstance(t, Tensor)}


def cut_over_ranks(config: RunConfig, rank: int, ranks: int) -> dict[str, Tensor]:
    """The routers that rank 0 would send if every rank had rows of each, as under FSDP."""
    plan = QuantPlan.from_hf_config(hf_config(config.model, VOCAB, 64), router="fp8-rounded")
    shards, generator = [], torch.Generator().manual_seed(4)
    for entry in plan.entries:
        whole = torch.randn(entry.shape, generator=generator).bfloat16()
        parts = ranks if ".mlp.gate." in entry.name else 1
        if rank < parts:
            rows = whole.chunk(parts)[rank]
            box = Box((rank * len(rows), *[0] * (whole.ndim - 1)), tuple(rows.shape))
            shards.append(LocalShard(entry.name, box, partial(torch.clone, rows)))
    metadata = [TensorMeta(e.name, torch.bfloat16, e.shape) for e in plan.entries]
    sent = dict(ShardedSource(metadata, shards).encoded(plan, to=[0]))
    return {n: t for n, t in sent.items() if ".mlp.gate." in n and isinstance(t, Tensor)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
