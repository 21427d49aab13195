"""The CUDA kernel compiles for an H100 anywhere, and is the reference bit for bit on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from fp8rl.quant import quantize_activations, quantize_blockwise
from fp8rl.quant.reference import reference_cast

triton = pytest.importorskip("triton")
from fp8rl.quant.triton_kernel import constants_of, quantize_kernel  # noqa: E402

BLOCKS = [(128, 128), (1, 128), (1, 32)]


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize(
    ("scale_format", "sticky"), [("pow2", False), ("fp32", False), ("pow2", True)]
)
def test_it_compiles_for_an_h100_to_exact_arithmetic(block_size, scale_format, sticky):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants_of(block_size, scale_format, sticky)
    signature = {
        **{"x_pointer": "*bf16", "data_pointer": "*fp8e4nv", "scale_pointer": "*fp32"},
        **{"n": "i32", "k": "i32", "expert_stride": "i64", "row_stride": "i64"},
        **{"scale_rows": "i32", **dict.fromkeys(constants, "constexpr")},
    }
    source = ASTSource(quantize_kernel, signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx  # the hardware's cast: nearest, ties to even
    assert ("div.rn.f32" in ptx) == (scale_format == "fp32")
    assert not any(word in ptx for word in ("fma", "ftz", "div.full", "div.approx", "rcp"))


INTERPRETED = """
import torch
from fp8rl.quant import QuantizedTensor
from fp8rl.quant.blockwise import empty_quantized
from fp8rl.quant.reference import reference_cast
from fp8rl.quant.triton_kernel import triton_cast

torch.manual_seed(0)
for shape, block in [((130, 200), (128, 128)), ((2, 33, 70), (1, 32)), ((3, 40, 60), (16, 16))]:
    for scale_format in ("pow2", "fp32"):
        x = torch.randn(shape) * torch.exp2(torch.randint(-40, 40, (*shape[:-1], 1)).float())
        x[..., 3:5, :] = 0.0
        wide = torch.full((*shape[:-1], shape[-1] + 7), torch.nan)
        wide[..., : shape[-1]] = x
        out = empty_quantized(shape, block_size=block, scale_format=scale_format)
        triton_cast(wide[..., : shape[-1]], out)
        data, scale_inv = reference_cast(x, block, scale_format)
        assert torch.equal(out.scale_inv, scale_inv), (shape, scale_format)
        apart = (out.data.view(torch.uint8).int() - data.view(torch.uint8).int()).abs()
        assert apart.max() <= 8 and (apart == 0).float().mean() > 0.9, (shape, scale_format)
finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
for shape, block in [((130, 200), (128, 128)), ((2, 33, 70), (1, 32)), ((3, 40, 60), (16, 16))]:
    codes = finite[torch.randint(len(finite), shape)]
    codes[..., :: block[0], :: block[1]] = 0x7E  # 448 in every block: nothing is to be rounded
    x = codes.view(torch.float8_e4m3fn).float() * 2.0**-20
    out = empty_quantized(shape, block_size=block)
    triton_cast(x, out)
    assert torch.equal(out.data.view(torch.uint8), codes)
    assert (out.scale_inv == 2.0**-20).all()
    out.scale_inv.copy_(2.0 ** torch.randint(-22, -16, out.scale_inv.shape))
    out.scale_inv[..., 0, 0] = 2.0**-19
    data, scale_inv = reference_cast(x, block, "pow2", out.scale_inv.clone())
    triton_cast(x, out, sticky=True)
    assert torch.equal(out.scale_inv, scale_inv)
    assert (scale_inv == 2.0**-19).any(), "no block keeps its scale"
    same = out.data.view(torch.uint8) == data.view(torch.uint8)
    assert same.float().mean() > 0.9
x = torch.ones(256, 256)
x[200, 200] = torch.nan
out = empty_quantized((256, 256))
triton_cast(x, out)
assert out.scale_inv.isnan().tolist() == [[False, False], [False, True]]
print("equal")
"""


def test_interpreted_on_a_cpu_it_has_the_references_scales_and_places():
    """Its interpreter rounds FP8 wrongly (a few codes differ); what needs no rounding is exact."""
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout == "equal\n", ran.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 200), (3, 100, 300), (4096, 4096)])
def test_on_a_gpu_it_is_the_reference(shape, scale_format, dtype):
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.randint(-14, 14, (*shape[:-1], 1), generator=generator).float())
    x = (torch.randn(shape, generator=generator) * size).to(dtype)
    found = quantize_blockwise(x.cuda(), scale_format=scale_format, fp32_as="master")
    groups = quantize_activations(x.cuda(), scale_format=scale_format)
    for q, block_size in ((found, (128, 128)), (groups, (1, 128))):
        data, scale_inv = reference_cast(x, block_size, scale_format)
        assert torch.equal(q.scale_inv.cpu(), scale_inv)
        assert torch.equal(q.data.cpu().view(torch.uint8), data.view(torch.uint8))


@pytest.mark.gpu
def test_on_a_gpu_sticky_scales_are_the_references():
    x = torch.randn(1100, 1030, generator=torch.Generator().manual_seed(0)).bfloat16()
    fresh = quantize_blockwise(x).scale_inv
    previous = fresh * 2.0 ** torch.arange(-3, 4).repeat(20)[: fresh.numel()].view(fresh.shape)
    found = quantize_blockwise(x.cuda(), previous_scale_inv=previous.cuda())
    data, scale_inv = reference_cast(x, (128, 128), "pow2", previous)
    assert torch.equal(found.scale_inv.cpu(), scale_inv)
    assert torch.equal(found.data.cpu().view(torch.uint8), data.view(torch.uint8))
