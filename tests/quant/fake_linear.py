"""A free-standing fake-quantized linear, and what it should compute by definition."""

import numpy as np
import torch
from torch import Tensor, nn

from fp8rl.quant import PlanEntry, QuantPlan, TrainerLinear, fake_quantize

from .oracle import E4M3, quantize_matrix

NAME = "model.layers.0.mlp.down_proj.weight"


def plan_of(*shapes: tuple[int, int], kept: tuple[str, ...] = ()) -> QuantPlan:
    """A plan of free-standing linears; the first is NAME, the others NAME.1, NAME.2, .."""
    names = [NAME, *(f"{NAME}.{i}" for i in range(1, len(shapes)))]
    entries = []
    for name, shape in zip(names, shapes, strict=True):
        dtype = torch.bfloat16 if name in kept else torch.float8_e4m3fn
        entries.append(PlanEntry(name, shape, name not in kept, "a test's", dtype))
    return QuantPlan(tuple(entries), "fp8", kept)


def linear(n: int, k: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(n + k)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def attach(module: nn.Linear, **options):
    """Fake-quantize one linear, whole; W8A16 unless asked otherwise."""
    rows = {NAME: torch.arange(module.out_features)}
    chosen = {"activations": None} | options
    plan = plan_of(tuple(module.weight.shape))
    return fake_quantize([TrainerLinear(module, rows)], plan, **chosen)


def computed_with(module: nn.Module, columns: int) -> Tensor:
    """The weight [N, K] with which a linear without bias computes: its output for the unit rows."""
    with torch.no_grad():
        return module(torch.eye(columns, dtype=torch.bfloat16)).T


def oracle(x: np.ndarray, block: tuple[int, int], scale_format: str) -> np.ndarray:
    """Quantized and read back, in float64, from the definition."""
    codes, scales = quantize_matrix(x, block, scale_format)
    n, k = x.shape
    spread = scales.repeat(block[0], 0)[:n].repeat(block[1], 1)[:, :k].astype(np.float64)
    return np.where(codes & 128, -1.0, 1.0) * E4M3[codes & 127] * spread
