"""In the place of Transformer Engine's layers and of grouped GEMM, which have no CPU build.

Their parameters have the names and shapes of the real ones, and they compute, so that Megatron's
own modules around them (TEGroupedMLP, GroupedMLP, MLASelfAttention) run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NormThenLinear(nn.Module):
    """In the place of TELayerNormColumnParallelLinear: the norm's weight lies in the linear."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        linear = ColumnParallelLinear(*args, **kwargs)
        linear.layer_norm_weight = nn.Parameter(torch.ones(args[0]))
        epsilon = kwargs["config"].layernorm_epsilon

        def normed(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            weight = module.layer_norm_weight
            norm = nn.functional.rms_norm(inputs[0], weight.shape, weight, epsilon)
            return (norm, *inputs[1:])

        linear.register_forward_pre_hook(normed)
        return linear


class WholeLinear(nn.Module):
    """In the place of TELinear, as MLA's down projections use it: every rank holds the whole."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.T, None


class LatentAttention(nn.Module):
    """Core attention of heads whose values are narrower than their keys; the local one has none."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class _Grouped(nn.Module):
    """In the place of TEGroupedLinear: one weight for each expert, in one module."""

    cut_rows: bool

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, pg_collection: Any, config: Any, **_: Any
    ) -> None:
        super().__init__()
        ranks = pg_collection.expt_tp.size()
        shape = (outputs // ranks, inputs) if self.cut_rows else (outputs, inputs // ranks)
        for expert in range(experts):
            weight = torch.empty(shape, dtype=config.params_dtype).normal_(0, 0.02)
            self.register_parameter(f"weight{expert}", nn.Parameter(weight))

    def forward(self, x: Tensor, counts: list[int]) -> tuple[Tensor, None]:
        weights = self.parameters()
        parts = zip(x.split(list(counts)), weights, strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None


class GroupedColumns(_Grouped):
    """Cut by rows of the weights."""

    cut_rows = True


class GroupedRows(_Grouped):
    """Cut by columns of the weights."""

    cut_rows = False


def grouped_matmul(x: Tensor, weights: Tensor, counts: Tensor, trans_b: bool) -> Tensor:
    """In the place of the grouped_gemm package's kernel."""
    assert not trans_b
    parts = zip(x.split(counts.tolist()), weights, strict=True)
    return torch.cat([part @ weight for part, weight in parts])
