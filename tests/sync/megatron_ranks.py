"""The ranks of test_megatron_ranks.py, real Gloo processes.

    python -m tests.sync.megatron_ranks FOLDER [some|all]

Four ranks hold some models in some layouts in turn, or all in all; what a layout leaves of them is
data parallel. Each model is loaded from the same checkpoint, exported whole and in FP8, and run.
What every rank saw goes to FOLDER/RANK.json.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import start_processes

from fp8rl.quant import QuantizedTensor, QuantPlan
from fp8rl.sync import MegatronSource, load_hf_checkpoint, shard_pass
from tests.sync.allocations import Allocations
from tests.sync.megatron_models import (
    CONFIGS,
    MOE,
    checkpoint,
    gpt_chunks,
    laid_out,
    logits,
)
from tests.sync.megatron_settings import Layout

RANKS = 4
DENSE_LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "pp2, two chunks a rank": Layout(pp=2, chunks=2),
    "tp4: pieces of kv heads, a rank of padding": Layout(tp=4, padded=160),
    "tp2, Transformer Engine's names": Layout(tp=2, fused=True),
}
MOE_LAYOUTS = {
    "ep2": Layout(ep=2),
    "tp2 ep2": Layout(tp=2, ep=2, etp=1),
    "etp2": Layout(etp=2),
    "pp2 ep2, grouped": Layout(pp=2, ep=2, experts="grouped", fused=True),
    "etp2 ep2, grouped": Layout(etp=2, ep=2, experts="grouped"),
    "etp2 ep2, stacked": Layout(etp=2, ep=2, experts="stacked"),
}
ALL = [(family, name) for family in CONFIGS for name in DENSE_LAYOUTS]
ALL += [(family, name) for family in MOE for name in MOE_LAYOUTS]
SOME = [
    ("qwen2", "pp2, two chunks a rank"),
    ("qwen3", "tp4: pieces of kv heads, a rank of padding"),
    ("qwen3-moe", "tp2 ep2"),
    ("mixtral", "etp2 ep2, stacked"),
]
CASES = {"some": SOME, "all": ALL}
ODD = CONFIGS["qwen3"] | {"head_dim": 32}  # norms that the distributed optimizer must pad


def digests(tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Name -> dtype, shape and digest of the bytes; of scales too."""
    found = {}
    for name, tensor in tensors:
        parts = [tensor.data, tensor.scale_inv] if isinstance(tensor, QuantizedTensor) else [tensor]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def plan_of(family: str) -> QuantPlan:
    """What is sent in FP8."""
    return QuantPlan.from_hf_config(CONFIGS[family], unfit="keep")


def case(family: str, layout: Layout, wanted: Tensor) -> dict[str, Any]:
    """Load, export and run one model in one layout."""
    config = CONFIGS[family]
    chunks = gpt_chunks(config, layout)
    load_hf_checkpoint(chunks, config, checkpoint(config))
    source = MegatronSource(chunks, config)
    exported = digests(source)
    before = source.wire_bytes
    encoded = digests(source.encoded(plan_of(family), to=[1]))
    sent = source.wire_bytes - before
    found = logits(chunks)
    error = None if found is None else float((found - wanted).norm() / wanted.norm())
    return {"exported": exported, "encoded": encoded, "sent": sent, "error": error}


def answer(call: Callable[[], object]) -> str:
    """The error that a mistake is answered with."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes(rank: int) -> dict[str, str]:
    """What each mistake of one rank is answered with on this rank."""
    config, found = CONFIGS["qwen3"], {}
    with laid_out(Layout(tp=2, pp=2)):
        chunks = gpt_chunks(config, Layout(tp=2, pp=2))
        if rank == 2:
            chunks[0].decoder.layers[1].mlp.surprise = torch.nn.Parameter(torch.zeros(3).bfloat16())
        found["a parameter more"] = answer(lambda: MegatronSource(chunks, config))
        if rank == 2:
            del chunks[0].decoder.layers[1].mlp.surprise
            chunks[0].decoder.layers[1].self_attention.linear_proj.weight = None
        found["a parameter less"] = answer(lambda: MegatronSource(chunks, config))
    return found


def memory() -> dict[str, int]:
    """Bytes that a pass takes on top of a rank's part of the model, at most; and of a layer."""
    config, layout = CONFIGS["llama"], Layout(tp=2, pp=2)
    with laid_out(layout):
        (model,) = gpt_chunks(config, layout)
        source = MegatronSource(model, config)
        tensors = [m for m in source.metadata() if ".layers.0." in m.name]
        layer = sum(2 * torch.Size(m.shape).numel() for m in tensors)
        with (
            mock.patch.object(shard_pass, "BUCKET_BYTES", layer),
            Allocations(model.parameters()) as seen,
        ):
            for _ in source.encoded(plan_of("llama"), to=[1]):
                pass
    return {"peak": seen.peak, "layer": layer}


def distributed_optimizer() -> dict[str, Any]:
    """Exports before and after a step of Megatron's distributed optimizer over four replicas."""
    config = ODD
    own_type = Tensor.type

    def cuda_type(tensor: Tensor, *args: Any) -> Any:
        found = own_type(tensor, *args)
        return found if args else f"torch.cuda.{found.rpartition('.')[2]}"

    with laid_out(Layout()), mock.patch.object(Tensor, "type", cuda_type):
        model, optimizer = with_distributed_optimizer(gpt_chunks(config)[0])
        load_hf_checkpoint(model, config, checkpoint(config))
        optimizer.reload_model_params()
        source = MegatronSource(model, config)
        before = digests(source)
        step(model, optimizer)
        held = sum(parameter.numel() for parameter in model.parameters())
        padding = sum(buffer.param_data.numel() for buffer in model.buffers) - held
        return {"before": before, "after": digests(source), "padding": padding}


def with_distributed_optimizer(model: Any) -> tuple[Any, Any]:
    """The model in Megatron's DDP, and the optimizer that shards its states over replicas."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        model,
    )
    chosen = OptimizerConfig(
        optimizer="adam", lr=0.01, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=True, clip_grad=0.0,
    )  # fmt: skip
    return wrapped, get_megatron_optimizer(chosen, [wrapped])


def step(model: Any, optimizer: Any) -> None:
    """One step on gradients of ones."""
    model.zero_grad_buffer()
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    model.finish_grad_sync()
    optimizer.step()


def main(rank: int, folder: Path, which: str) -> None:
    """Run everything, in the same order on all ranks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    wanted = load_file(folder / "logits.safetensors")
    facts: dict[str, Any] = {}
    for name, layout in (DENSE_LAYOUTS | MOE_LAYOUTS).items():
        families = [family for family, of_case in CASES[which] if of_case == name]
        with laid_out(layout) if families else nullcontext():
            for family in families:
                facts[f"{family}, {name}"] = case(family, layout, wanted[family])
    facts["mistakes"] = mistakes(rank)
    facts["memory"] = memory()
    facts["distributed optimizer"] = distributed_optimizer()
    (folder / f"{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.pipeline_parallel  # noqa: F401

    # Forked before any thread of torch runs, so that all is imported once.
    start_processes(main, (Path(sys.argv[1]), sys.argv[2]), nprocs=RANKS, start_method="fork")
