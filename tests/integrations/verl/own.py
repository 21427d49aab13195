"""veRL's own functions, as they are without fp8rl, and small batches to compare on."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def own_helper() -> ModuleType:
    """A second copy of veRL's correction, executed from its file, which nothing has mended."""
    name = "verl.trainer.ppo.rollout_corr_helper"
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    copy = importlib.util.spec_from_file_location("own_rollout_corr_helper", spec.origin)
    assert copy is not None and copy.loader is not None
    module = importlib.util.module_from_spec(copy)
    sys.modules[copy.name] = module
    copy.loader.exec_module(module)
    return module


def batch(
    seed: int = 0, rows: int = 6, tokens: int = 9, apart: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of both policies and a mask (int64, as veRL's) with ragged ends, fp32."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, tokens, generator=generator) * 3 - 0.5
    train = (rollout + apart * torch.randn(rows, tokens, generator=generator)).clamp(max=-1e-3)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    return train, rollout, mask


def actor(**settings: Any) -> Any:
    """veRL's actor config, with what its dataclass wants."""
    from verl.workers.config import FSDPActorConfig

    return FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
