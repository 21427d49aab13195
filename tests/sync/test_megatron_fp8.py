"""Weights that Megatron holds in Transformer Engine's FP8 are published as they are.

Transformer Engine has no CPU build: here its class has a name and nothing else, and the bytes are
ours. The test with its own tensors needs a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp8rl.quant import Box, quantize_blockwise
from fp8rl.quant.errors import TransformerEngineError
from fp8rl.sync import SourceError
from fp8rl.sync.megatron_fp8 import BLOCKWISE, fp8_part, holds_fp8, take_blocks
from fp8rl.sync.megatron_layout import Held, Part

Runs = tuple[tuple[int, int], ...]


def held(parameter: Tensor, *parts: Runs, dim: int = 0) -> Held:
    """A parameter of several tensors, each some runs of its rows (or columns)."""
    described = tuple(Part(f"tensor {i}", Box((0, 0), (1, 1)), dim, p) for i, p in enumerate(parts))
    shape = tuple(parameter.shape)
    return Held("linear_qkv.weight", parameter, shape, None, torch.bfloat16, described, True)


def of_kind(name: str, rows: int, columns: int = 256) -> Tensor:
    """A parameter of a class of this name."""
    kind = type(name, (nn.Parameter,), {})
    parameter: Tensor = kind(torch.zeros(rows, columns))
    return parameter


def scaled(rows: int, columns: int) -> Tensor:
    """A weight whose blocks all have other scales."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (noise * 4.0 ** torch.arange(rows)[:, None].div(128, rounding_mode="floor")).bfloat16()


@pytest.mark.parametrize(
    ("dim", "runs"),
    [(0, [(0, 256), (384, 128)]), (0, [(256, 128), (0, 128)]), (0, [(384, 216)]), (1, [(128, 72)])],
)
def test_runs_of_whole_blocks_keep_their_bytes_and_scales(
    dim: int, runs: list[tuple[int, int]]
) -> None:
    weight = scaled(600, 200)
    found = take_blocks(quantize_blockwise(weight), dim, runs)
    parts = [weight.narrow(dim, first, size) for first, size in runs]
    wanted = quantize_blockwise(torch.cat(parts, dim))
    assert torch.equal(found.scale_inv, wanted.scale_inv)
    assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8))


def test_a_plain_parameter_is_not_fp8() -> None:
    assert not holds_fp8(held(nn.Parameter(torch.zeros(256, 256)), ((0, 64),), ((64, 192),)))


def test_tensors_of_whole_blocks_are_taken() -> None:
    weight = of_kind(BLOCKWISE, 600)
    assert holds_fp8(held(weight, ((0, 128), (384, 128)), ((128, 256),), ((512, 88),)))
    assert holds_fp8(held(of_kind(BLOCKWISE, 64, 300), ((0, 300),), dim=1))


@pytest.mark.parametrize("runs", [((0, 64),), ((64, 128),), ((0, 128), (192, 128))])
def test_tensors_that_share_a_block_are_refused(runs: Runs) -> None:
    with pytest.raises(SourceError, match=r"linear_qkv\.weight.*tensor 0, which are not whole b"):
        holds_fp8(held(of_kind(BLOCKWISE, 512), runs))


@pytest.mark.parametrize("kind", ["Float8Tensor", "MXFP8Tensor", "DTensor"])
def test_parameters_of_other_kinds_are_refused_by_name(kind: str) -> None:
    with pytest.raises(SourceError, match=rf"linear_qkv\.weight' is a {kind}; expected a plain"):
        holds_fp8(held(of_kind(kind, 256), ((0, 256),)))


def test_without_transformer_engine_such_a_parameter_cannot_be_read() -> None:
    with pytest.raises(TransformerEngineError, match=r"Transformer Engine 2\.3 or later"):
        fp8_part(held(of_kind(BLOCKWISE, 256), ((0, 256),)), 0, [(0, 256)])


@pytest.mark.gpu
def test_transformer_engines_own_weight_is_read_run_by_run() -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    make = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=2
    )
    weight = scaled(640, 256).cuda()
    stored = held(make(weight), ((0, 256), (512, 128)), ((256, 256),))
    assert te is not None and holds_fp8(stored)
    found = fp8_part(stored, 0, stored.parts[0].runs)
    wanted = quantize_blockwise(torch.cat([weight[:256], weight[512:]]))
    assert torch.equal(found.data.view(torch.uint8), wanted.data.view(torch.uint8))
    assert torch.equal(found.scale_inv, wanted.scale_inv)
