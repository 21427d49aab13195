"""The ranks of test_fsdp.py, real Gloo processes: `python -m tests.sync.fsdp_ranks FOLDER RANKS`.

transformers' own models under FSDP2, in several layouts. FOLDER/FAMILY holds what `save_pretrained`
wrote of each; every rank writes to FOLDER/RANK.json what of its export differs from that.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing import start_processes

from fp8rl.quant import QuantPlan, quantize_blockwise
from fp8rl.sync.fsdp import FSDPSource
from fp8rl.sync.source import IterableSource, WeightSource, encoded
from tests.sync.sharded_model import wrong

BASE: dict[str, Any] = {
    "vocab_size": 97,  # no rank's part is like another's
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 128, "mlp_only_layers": [0]},
    "qwen2": {},
    "llama": {"attention_bias": True},
    "mixtral": {"num_local_experts": 3},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
}
ALL_FAMILIES = [*FAMILIES]


def config(family: str) -> Any:
    """A config of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(family, **(BASE | FAMILIES[family]))
    made.architectures = [AutoModelForCausalLM._model_mapping[type(made)].__name__]
    return made


def model(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A random model, the same on every rank."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    return AutoModelForCausalLM.from_config(config(family)).to(dtype)  # type: ignore[no-any-return]


@cache
def plan(family: str) -> QuantPlan:
    """Which tensors are quantized."""
    return QuantPlan.from_hf_config(config(family).to_dict(), unfit="keep")


@cache
def saved(folder: Path, family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What save_pretrained wrote."""
    return load_file(folder / family / str(dtype) / "model.safetensors")


def rows(made: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """FSDP2 as it is used: each layer, then the rest."""
    for layer in made.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(made, mesh=mesh, **options)
    return made


def with_tensor_parallel(made: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel within, FSDP2 over it; embeddings, norms and head by FSDP2 alone."""
    styles = {
        "q": ColwiseParallel,
        "k": ColwiseParallel,
        "v": ColwiseParallel,
        "o": RowwiseParallel,
    }
    cut: dict[str, Any] = {f"self_attn.{x}_proj": style() for x, style in styles.items()}
    cut |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for layer in made.model.layers:
        parallelize_module(layer, mesh["tp"], cut | {"mlp.down_proj": RowwiseParallel()})
    return rows(made, mesh["dp"])


def experts_by_rows(made: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each expert's rows and columns cut, not the experts among the ranks."""
    return rows(made, mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 3 else None)


def compiled(made: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Wrappers that rename parameters."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    made.model.layers[0] = checkpoint_wrapper(made.model.layers[0])
    made.model.layers[1] = torch.compile(made.model.layers[1], backend="eager")
    return rows(made, mesh)


def after_a_forward(made: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The root's parameters are whole until the next backward."""
    rows(made, mesh)
    with torch.no_grad():
        made(torch.arange(4)[None])
    assert any(not hasattr(p, "full_tensor") for p in made.parameters())
    return made


Layout = Callable[[nn.Module, Any], nn.Module]


def layouts(ranks: int) -> dict[str, tuple[str, Layout, tuple[int, ...], torch.dtype]]:
    """Name -> family, how it is laid out, shape of the mesh, dtype."""
    bf16, fp32 = torch.bfloat16, torch.float32
    found: dict[str, tuple[str, Layout, tuple[int, ...], torch.dtype]] = {
        "fsdp": ("qwen3_moe", rows, (ranks,), bf16),
    }
    if ranks == 4:
        found |= {
            "hsdp": ("qwen3_moe", experts_by_rows, (2, 2), bf16),
            "fsdp and tp": ("qwen3", with_tensor_parallel, (2, 2), bf16),
        }
    else:
        found["masters"] = ("qwen3", rows, (ranks,), fp32)
        found["wrapped"] = ("qwen3", compiled, (ranks,), bf16)
        found["after a forward"] = ("qwen3", after_a_forward, (ranks,), bf16)
        offload = partial(rows, offload_policy=CPUOffloadPolicy(pin_memory=False))
        found["offloaded"] = ("qwen3", offload, (ranks,), bf16)
        mixed = partial(rows, mp_policy=MixedPrecisionPolicy(param_dtype=bf16))
        found["mixed precision"] = ("qwen2", mixed, (ranks,), fp32)
        found |= {f"fsdp, {family}": (family, rows, (ranks,), bf16) for family in ALL_FAMILIES}
    return found


def differences(source: WeightSource, folder: Path, family: str, dtype: torch.dtype) -> Any:
    """What of an export is not that of save_pretrained, whole and as FP8 on the last rank."""
    last = dist.get_world_size() - 1
    want = saved(folder, family, dtype)
    whole = dict(source)
    found = {"iterated": wrong(dict(sorted(whole.items())), dict(sorted(want.items())))}
    for fp32_as in ("master", "export") if dtype == torch.float32 else ("master",):
        got = dict(encoded(source, plan(family), to=[last], fp32_as=fp32_as))
        first = {
            entry.name: quantize_blockwise(want[entry.name], fp32_as=fp32_as)
            if entry.quantized
            else want[entry.name].to(entry.dtype)
            for entry in plan(family).entries
        }
        expected = first if dist.get_rank() == last else {}
        found[fp32_as] = wrong(dict(sorted(got.items())), dict(sorted(expected.items())))
    return found


def placements(made: nn.Module) -> list[str]:
    """The kinds of placement that occur, with the dimension that they cut."""
    found = set()
    for tensor in made.state_dict().values():
        for placement in getattr(tensor, "placements", ()):
            found.add(f"{type(placement).__name__} {getattr(placement, 'dim', '')}".strip())
    return sorted(found)


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What cannot be described, and what each call is answered with."""

    def partial_sum() -> nn.Module:
        made = nn.Linear(8, 8, bias=False)
        made.weight = nn.Parameter(DTensor.from_local(torch.ones(8, 8), mesh, [Partial()]))
        return made

    def flat() -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return nn.Sequential(
            FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu"))
        )

    makers = {"partial": partial_sum, "fsdp1": flat}
    return {name: answer(lambda make=make: FSDPSource(make())) for name, make in makers.items()}  # type: ignore[misc]


def iterated(folder: Path, made: nn.Module) -> dict[str, Any]:
    """The same model as an iterable of DTensors; a mistake on the destination reaches all ranks."""
    source = IterableSource(lambda: iter(made.state_dict().items()))

    def leave() -> None:
        with closing(encoded(source, plan("qwen3"), to=[1])) as tensors:  # type: ignore[type-var]
            for _ in tensors:
                return

    def broken() -> None:
        made.model.norm.weight.data.fill_(torch.nan)
        for _ in encoded(source, plan("qwen3"), to=[1]):
            pass

    tied = IterableSource([pair for pair in source if pair[0] != "lm_head.weight"])
    found = differences(tied, folder, "qwen3", torch.bfloat16)
    found["with head"] = differences(source, folder, "qwen3", torch.bfloat16)["master"]
    return {
        "iterable": found,
        "refusals": {name: answer(call) for name, call in {"left": leave, "nan": broken}.items()},
    }


def answer(call: Callable[[], object]) -> str:
    """The error that a call ends with."""
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank: int, folder: Path, ranks: int) -> None:
    """Run everything, in the same order on all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    facts: dict[str, Any] = {"differences": {}, "placements": {}, "quantized": {}}
    for name, (family, lay_out, shape, dtype) in layouts(ranks).items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
        made = lay_out(model(family, dtype), mesh)
        source = FSDPSource(made)
        facts["differences"][name] = differences(source, folder, family, dtype)
        facts["placements"][name] = placements(made)
        facts["quantized"][name] = [e.name for e in plan(family).entries if e.quantized]
        if name in ("fsdp and tp", "wrapped"):
            facts |= iterated(folder, made)
            facts["refusals"] |= refusals(init_device_mesh("cpu", (ranks,)))
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    target, size = Path(sys.argv[1]), int(sys.argv[2])
    for family, dtype in {(family, dtype) for family, *_, dtype in layouts(size).values()}:
        made = model(family, dtype)  # imports all of it before the ranks fork
        made.save_pretrained(target / family / str(dtype))
    start_processes(main, (target, size), nprocs=size, start_method="fork")
