"""Small Hugging Face checkpoints on disk, written and read by the safetensors library itself."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fp8rl.quant import QuantPlan

from .plan_models import TINY

INDEX = "model.safetensors.index.json"


def config_of(model: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    return TINY[model] | {"torch_dtype": "bfloat16"} | changes


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Every tensor of the model of `config`; magnitudes differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in QuantPlan.from_hf_config(config, unfit="keep").entries:
        x = torch.randn(entry.shape, generator=generator)
        rows = (*entry.shape[:1], *[1] * (x.ndim - 1))
        x *= 2.0 ** torch.randint(-9, 1, rows, generator=generator)
        wide = entry.dtype == torch.float32
        tensors[entry.name] = x if wide else x.to(dtype)
    return tensors


def save(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    """Write a checkpoint: one file, or several and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, read by the safetensors library, after the index if there is one."""
    files = {"model.safetensors": None}
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = dict.fromkeys(weight_map.values())
        assert not (folder / "model.safetensors").exists()
    tensors = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            for name in opened.keys():  # noqa: SIM118
                assert name not in tensors
                tensors[name] = opened.get_tensor(name)
    return tensors


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every byte."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
