"""The chunked and the compiled cast are the reference, bit for bit, wherever they are chosen."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import (
    NonFiniteWeightError,
    QuantFormatError,
    QuantizedTensor,
    ScaleFormat,
    empty_quantized,
    quantize_activations,
    quantize_blockwise,
)
from fp8rl.quant import chunked as chunked_module
from fp8rl.quant.chunked import chunked_cast
from fp8rl.quant.compiled import SMALLEST, compiled_cast
from fp8rl.quant.reference import reference_cast
from fp8rl.quant.tensor import scale_shape

from . import fast_process
from .refusal import refusal

FORMATS = ("pow2", "fp32")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Compiling takes seconds for each, so the other pairs are left to the probe of compiled.py itself.
KINDS = [
    (torch.bfloat16, (128, 128)),
    (torch.float32, (128, 128)),
    (torch.bfloat16, (1, 128)),
    (torch.bfloat16, (1, 32)),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Denormal to huge by bands of rows, wide and narrow within; signed zeros and zero blocks."""
    generator = torch.Generator().manual_seed(seed)
    *lead, n, k = shape
    info = torch.finfo(dtype)
    low, high = math.log2(info.smallest_normal) - 6, math.log2(info.max)
    bands = torch.rand((*lead, n // 100 + 1, 1), generator=generator) * (high - low) + low
    size = bands.repeat_interleave(100, dim=-2)[..., :n, :].repeat_interleave(k, dim=-1)
    size[..., : n // 3, :] -= 20 * torch.rand((n // 3, k), generator=generator)
    x = torch.randn(shape, generator=generator) * torch.exp2(size)
    x[..., ::7, ::5] = -0.0
    x[..., : n // 2, k // 3 : k // 3 + 200] = 0.0
    return x.clamp(-info.max, info.max).to(dtype)


def assert_is_reference(x: torch.Tensor, q: QuantizedTensor) -> None:
    data, scale_inv = reference_cast(x, q.block_size, q.scale_format)
    assert torch.equal(q.scale_inv, scale_inv)
    assert torch.equal(q.data.view(torch.uint8), data.view(torch.uint8))


def quantize(
    x: torch.Tensor, block_size: tuple[int, int] = (128, 128), scale_format: ScaleFormat = "pow2"
) -> QuantizedTensor:
    return quantize_blockwise(x, block_size=block_size, scale_format=scale_format, fp32_as="master")


@contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of one row of blocks, so that small tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_module, "_CHUNK", 64)
        yield


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50))
    | st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([(16, 16), (1, 16), (16, 1), (5, 7), (128, 128)]),
    scale_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32),
)
def test_the_chunked_cast_is_the_reference(shape, dtype, block_size, scale_format, seed):
    x = values(shape, dtype, seed)
    out = empty_quantized(shape, block_size=block_size, scale_format=scale_format)
    with small_chunks():
        chunked_cast(x, out)
    assert_is_reference(x, out)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lead=st.sampled_from([(), (), (1,), (3,)]),
    columns=st.integers(2, 12),
    more_rows=st.integers(0, 300),
    scale_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32),
)
def test_the_compiled_cast_is_the_reference(kind, lead, columns, more_rows, scale_format, seed):
    """Matrices and experts, with and without a ragged last row of blocks."""
    dtype, block_size = kind
    k = columns * block_size[1]
    n = max(math.ceil(SMALLEST / k / math.prod(lead)), 2 * block_size[0]) + more_rows
    x = values((*lead, n, k), dtype, seed)
    out = empty_quantized(x.shape, block_size=block_size, scale_format=scale_format)
    assert compiled_cast(x, out), "there is no working compiler here"
    assert_is_reference(x, out)


@pytest.mark.parametrize("shape", [(1024, 1024), (1100, 1280), (3, 700, 640), (1100, 1030)])
def test_with_previous_scales_too_every_path_is_the_reference(shape):
    x = values(shape, torch.bfloat16, 18)
    fresh = quantize(x).scale_inv
    shift = torch.randint(-3, 4, fresh.shape, generator=torch.Generator().manual_seed(0))
    previous = (fresh * torch.exp2(shift.float())).clamp(2.0**-126, 2.0**127)
    found = quantize_blockwise(x, previous_scale_inv=previous)
    data, scale_inv = reference_cast(x, (128, 128), "pow2", previous)
    assert torch.equal(found.scale_inv, scale_inv) and not torch.equal(scale_inv, fresh)
    assert torch.equal(found.data.view(torch.uint8), data.view(torch.uint8))


# 2^20 elements and more, each laid out in memory in its own way.
LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "whole blocks": lambda dtype: values((1024, 1024), dtype, 0),
    "ragged columns": lambda dtype: values((1100, 1030), dtype, 1),
    "few rows": lambda dtype: values((200, 6000), dtype, 2),
    "transposed": lambda dtype: values((1024, 1152), dtype, 3).t(),
    "columns of a wider one": lambda dtype: values((1100, 1300), dtype, 4)[:, 100:1124],
    "every second column": lambda dtype: values((1100, 2048), dtype, 5)[:, ::2],
    "every second row": lambda dtype: values((2048, 1024), dtype, 6)[::2],
    "one row repeated": lambda dtype: values((1, 2048), dtype, 7).expand(640, 2048),
    "an odd offset": lambda dtype: (
        values((1025, 1024), dtype, 8).flatten()[3 : 3 + 2**20].view(1024, 1024)
    ),
    "experts": lambda dtype: values((3, 700, 640), dtype, 9),
    "every second expert": lambda dtype: values((6, 512, 1024), dtype, 10)[::2],
    "experts of a wider one": lambda dtype: values((3, 700, 900), dtype, 11)[:, 44:, 4:772],
    "experts, transposed": lambda dtype: values((3, 640, 700), dtype, 12).transpose(1, 2),
    "experts along the columns": lambda dtype: values((640, 3, 640), dtype, 13).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_shape_and_stride_is_quantized_as_by_the_reference(layout, dtype):
    x = LAYOUTS[layout](dtype)
    assert x.numel() >= SMALLEST
    before = x.clone()
    assert_is_reference(x, quantize(x))
    assert torch.equal(x, before), "the input must not be written to"
    assert_is_reference(x, quantize(x, block_size=(100, 64)))
    if dtype == torch.bfloat16:
        assert_is_reference(x, quantize_activations(x))


def test_activations_of_any_rank():
    x = values((2, 3, 400, 640), torch.bfloat16, 14)
    assert_is_reference(x, quantize_activations(x))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    "shape", [(1024, 1024), (1100, 1030), (3, 700, 640), (40, 50), (3, 20, 30)]
)
@pytest.mark.parametrize("offset", [0, 1, 16, 36])
def test_a_view_of_a_send_buffer_is_written_and_nothing_beside_it(shape, scale_format, offset):
    x = values(shape, torch.bfloat16, 15)
    scales_shape = scale_shape(shape, (128, 128))
    end = offset + x.numel()
    data_buffer = torch.full((end + 64,), 0x5A, dtype=torch.uint8)
    scale_buffer = torch.full((offset + math.prod(scales_shape) + 64,), 0.125)
    scale_end = offset + math.prod(scales_shape)
    out = QuantizedTensor(
        data_buffer[offset:end].view(torch.float8_e4m3fn).view(shape),
        scale_buffer[offset:scale_end].view(scales_shape),
        (128, 128),
        scale_format,
    )
    assert quantize_blockwise(x, scale_format=scale_format, out=out) is out
    assert_is_reference(x, out)
    for buffer, stop, guard in [(data_buffer, end, 0x5A), (scale_buffer, scale_end, 0.125)]:
        assert (buffer[:offset] == guard).all() and (buffer[stop:] == guard).all()


def test_an_out_that_does_not_fit_is_refused():
    x = torch.ones(256, 256, dtype=torch.bfloat16)
    wide = empty_quantized((256, 512))
    for out, message in [
        (empty_quantized((256, 255)), r"w: out is .*\(256, 255\).*expected \(\(256, 256\)"),
        (empty_quantized((256, 256), block_size=(64, 128)), r"\(64, 128\).*expected"),
        (empty_quantized((256, 256), scale_format="fp32"), "'fp32'.*expected .*'pow2'"),
        (empty_quantized((256, 256), device="meta"), "meta.*expected"),
        (
            QuantizedTensor(wide.data[:, :256], wide.scale_inv[:, :2], (128, 128), "pow2"),
            "w: out must be contiguous",
        ),
    ]:
        with refusal(QuantFormatError, message):
            quantize_blockwise(x, name="w", out=out)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("shape", [(1024, 1024), (1100, 1030), (3, 700, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_non_finite_element_anywhere_is_found(dtype, shape, bad):
    x = torch.full(shape, 0.5, dtype=dtype)
    last = tuple(size - 1 for size in shape)
    for index in (tuple(0 for _ in shape), (*last[:-2], 300, 500), last):
        x[index] = bad
        message = rf"w: 1 non-finite .* first at index {re.escape(str(list(index)))} \({bad}\)"
        with pytest.raises(NonFiniteWeightError, match=message):
            quantize_blockwise(x, name="w", fp32_as="master")
        x[index] = 0.5
    assert_is_reference(x, quantize(x))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_the_state_of_torch_changes_nothing_and_is_no_reason_to_leave_the_compiler(
    state, scale_format
):
    small, large = values((40, 50), torch.bfloat16, 16), values((1024, 1024), torch.bfloat16, 16)
    out = empty_quantized(large.shape, scale_format=scale_format)
    with STATES[state](), warnings.catch_warnings():
        warnings.filterwarnings("error", message="fp8rl")
        assert compiled_cast(large, out)
        found = quantize(small, scale_format=scale_format)
        learned = quantize(large.clone().requires_grad_(), scale_format=scale_format)
    assert_is_reference(large, out)
    assert_is_reference(large, learned)
    assert_is_reference(small, found)


def test_one_graph_serves_every_shape():
    def cast(*shapes: tuple[int, ...]) -> int:
        for shape in shapes:
            out = empty_quantized(shape)
            assert compiled_cast(torch.ones(shape, dtype=torch.bfloat16), out)
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    before = cast((1024, 1024))
    assert cast((2048, 1024), (1100, 1280), (256, 4096), (8, 384, 512), (3, 700, 640)) == before


def test_threads_quantize_while_one_compiles():
    def cast(x: torch.Tensor) -> QuantizedTensor:
        return quantize(x, block_size=(1, 32) if x.dtype == torch.float32 else (128, 128))

    new_kind = values((600, 2048), torch.float32, 17)
    tensors = [new_kind, *(values((600 + 10 * i, 2048), torch.bfloat16, i) for i in range(6))]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(cast, tensors))
    for x, q in zip(tensors, results, strict=True):
        assert_is_reference(x, q)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process saw with a compiler, with it switched off, and with none to be found."""
    environments = {
        "compiled": {},
        "switched off": {"TORCHDYNAMO_DISABLE": "1"},
        "no compiler": {
            "CXX": "/nonexistent/c++",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("empty")),
        },
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, str(Path(fast_process.__file__))],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, environment in environments.items()
    }
    found = {}
    try:
        for name, process in running.items():
            output, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            found[name] = json.loads(output)
    finally:
        for process in running.values():
            process.kill()
    return found


def test_without_a_compiler_the_result_is_the_same(processes):
    assert len(set(processes["compiled"]["digests"])) == 4  # the first tensor is cast twice
    for name in ("switched off", "no compiler"):
        assert processes[name]["digests"] == processes["compiled"]["digests"]


def test_without_a_compiler_one_warning_says_so_and_why(processes):
    assert processes["compiled"]["warnings"] == []
    for name, why in [
        ("switched off", r"TORCHDYNAMO_DISABLE"),
        ("no compiler", r"No working C\+\+ compiler found"),
    ]:
        (warning,) = processes[name]["warnings"]
        assert re.match(
            rf"fp8rl quantizes without a compiler.*with the same result.*{why}", warning
        )


@pytest.mark.parametrize("name", ["compiled", "switched off", "no compiler"])
def test_quantizing_makes_no_copy_of_the_weight(processes, name):
    """Sixteen MiB are a quarter of an fp32 copy, and half of a bf16 one."""
    extra = dict(processes[name]["peaks"])
    assert extra.pop("reference") > 64
    assert len(extra) == 4 and max(extra.values()) < 16, extra
