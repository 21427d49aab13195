"""vLLM's own trainers and workers carry our FP8 stream, and the engine answers as a fresh one.

Where no GPU is, `nccl` runs with Gloo in NCCL's place (`gloo_backend.py`). The runs over NCCL and
CUDA IPC themselves are marked `gpu`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.quant import NonFiniteWeightError
from fp8rl.sync.errors import SourceError
from fp8rl.sync.source import IterableSource
from fp8rl.sync.vllm_source import VLLMWeights
from tests import helpers
from tests.sync.vllm_source_worker import FINAL

PLAN = helpers.settings().plan()
WEIGHTS = helpers.weights(4)


def stream() -> VLLMWeights:
    weights = VLLMWeights(IterableSource(WEIGHTS), PLAN)
    weights.kv_scales = helpers.scales(3)
    return weights


def test_what_is_announced_is_what_the_engine_takes_and_what_is_yielded() -> None:
    """vLLM sizes its buffers by the metadata and fills them from the iteration."""
    announced = [(m.name, m.dtype, m.shape) for m in stream().metadata()]
    for _ in range(2):
        assert [(n, t.dtype, tuple(t.shape)) for n, t in stream()] == announced
    expected = [(t.name, t.dtype, t.shape) for t in PLAN.engine_tensors()]
    scales = helpers.scales(3).tensors()
    expected += [(name, t.dtype, tuple(t.shape)) for name, t in scales.items()]
    assert sorted(map(str, announced)) == sorted(map(str, expected))
    names = [name for name, *_ in announced]
    at = names.index("model.layers.0.self_attn.attn.q_scale")
    assert names[at : at + 3] == list(scales)[:3]  # q, k and v together
    assert names[at + 3].startswith("model.layers.1.")


def test_scales_of_a_layer_that_is_not_there_are_refused() -> None:
    weights = {name: t for name, t in WEIGHTS.items() if ".layers.1." not in name}
    source = VLLMWeights(IterableSource(weights), PLAN)
    source.kv_scales = helpers.scales(3)
    with pytest.raises(SourceError, match=r"layers.1.self_attn.attn.q_scale: the source has no"):
        source.metadata()


def test_vllm_takes_it_for_a_source_of_its_own() -> None:
    from vllm.distributed.weight_transfer.base import WeightSource

    assert isinstance(stream(), WeightSource)
    names = [name for group, _ in stream().iter_groups() for name in group]
    assert sorted(names) == sorted(meta.name for meta in stream().metadata())


def test_it_survives_vllm_s_packing_byte_for_byte() -> None:
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

    pairs, found = iter(stream()), {}
    while (chunk := pack_tensors(pairs, lambda pair: pair[1], 300_000)) is not None:
        dtypes, sizes = chunk.dtypes, chunk.tensor_sizes
        found |= dict(unpack_tensor(chunk.packed_tensor, chunk.names, chunk.shapes, dtypes, sizes))
    for name, tensor in stream():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_without_an_fp8_cache_no_scales_are_sent() -> None:
    weights = VLLMWeights(IterableSource(WEIGHTS), PLAN)
    assert len(weights.metadata()) == len(PLAN.engine_tensors()) == len(list(weights))


def test_what_does_not_fit_the_plan_is_refused_when_it_is_announced() -> None:
    lacking = {name: t for name, t in WEIGHTS.items() if name != "model.norm.weight"}
    with pytest.raises(SourceError, match=r"the source lacks 1 .*'model.norm.weight'"):
        VLLMWeights(IterableSource(lacking), PLAN).metadata()


def test_nan_ends_the_stream() -> None:
    bad = {**WEIGHTS, "model.norm.weight": torch.full((256,), torch.nan).bfloat16()}
    with pytest.raises(NonFiniteWeightError, match=r"model.norm.weight: 256"):
        list(VLLMWeights(IterableSource(bad), PLAN))


def run(backend: str, folder: Path) -> dict[str, Any]:
    """What the updated engine and the fresh one answered."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.sync.vllm_source_worker", backend, str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("gloo", marks=[pytest.mark.long]),
        pytest.param("ipc", marks=[pytest.mark.gpu]),
        pytest.param(
            "nccl", marks=[pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]
        ),
    ],
)
def test_after_two_updates_the_engine_answers_as_one_that_loaded_the_same_from_disk(
    backend: str, tmp_path: Path
) -> None:
    found = run(backend, tmp_path)
    assert found[f"updated to {FINAL}"] == found["fresh"]
    assert found["updated to 0"] != found["fresh"]
