"""The engines read the plan's quantization_config as the plan means it, layer by layer.

vLLM's real models are built from it, in a process of their own, and transformers' real quantizer
goes over its real models.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8rl.quant import QuantPlan
from fp8rl.quant.plan import BLOCK_SIZE

from .plan_models import TINY

OPTIONS = {
    "all": {},
    "first": {"keep_first_layers": 1},
    "last": {"keep_last_layers": 1},
    "mlps": {"keep_patterns": ["model.layers.1.[!s]*"]},
    "attention": {"keep_patterns": ["*.2.self_attn.*"]},
}
# A width that is not whole blocks: what reads it is kept, by name.
UNFIT = {"intermediate_size": 192, "moe_intermediate_size": 192}


def planned(model: str, options: dict) -> tuple[dict, QuantPlan]:
    change = UNFIT if options.get("unfit") == "keep" else {}
    config = TINY[model] | change
    return config, QuantPlan.from_hf_config(config, **options)


CASES = {
    f"{model} {name}": planned(model, options)
    for model in TINY
    for name, options in (OPTIONS | {"unfit": {"unfit": "keep"}}).items()
}


@pytest.fixture(scope="module")
def vllm_layers(tmp_path_factory) -> dict:
    pytest.importorskip("vllm")
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if not torch.cuda.is_available() and not has:
        pytest.skip("vLLM builds FP8 linears only with AMX, AVX-512 BF16 or CUDA")
    cases = {
        case: config | {"quantization_config": plan.quantization_config()}
        for case, (config, plan) in CASES.items()
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.quant.plan_vllm_worker", tmp_path_factory.mktemp("vllm")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_vllm_quantizes_the_layers_that_the_plan_does(vllm_layers, case):
    _, plan = CASES[case]
    unplaced = {e.name: e.quantized for e in plan.entries if ".layers." in e.name}
    unplaced = {n: q for n, q in unplaced.items() if "norm" not in n and n.endswith(".weight")}
    for module, (in_fp8, parts) in vllm_layers[case].items():
        names = [n for n in unplaced if any(n.startswith(f"{part}.") for part in parts)]
        assert names, module
        assert {unplaced.pop(name) for name in names} == {in_fp8}, module
    assert not unplaced


@pytest.mark.parametrize("case", CASES)
def test_transformers_quantizes_the_layers_that_the_plan_does(case):
    transformers = pytest.importorskip("transformers")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config, plan = CASES[case]
    wanted = transformers.FineGrainedFP8Config(**plan.quantization_config())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    assert tuple(wanted.weight_block_size) == BLOCK_SIZE
    fp8.replace_with_fp8_linear(model, wanted.modules_to_not_convert, wanted, pre_quantized=True)
    unplaced = {e.name.replace("block_sparse_moe", "mlp") for e in plan.entries if e.quantized}
    for module, kind in model.named_modules():
        if isinstance(kind, fp8.FP8Linear | fp8.FP8Experts):
            names = {n for n in unplaced if n.startswith(f"{module}.")}
            assert names, module
            unplaced -= names
    assert not unplaced


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize("inner", [128, 192, 512, 1024, 1536])
def test_vllm_accepts_every_shard_that_the_plan_quantizes(ranks, head, inner, monkeypatch):
    """vLLM's own check of block shapes, on the shards of q, k, v, o and gate, up, down."""
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.fp8_utils")
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_world_size", lambda: ranks)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": head}
    config = TINY["qwen3"] | sizes | {"intermediate_size": inner}
    plan = QuantPlan.from_hf_config(config, tensor_parallel=ranks, unfit="keep")
    q, kv = 8 * head // ranks, max(2 // ranks, 1) * head
    shards = {  # linear: (K, K of a rank, rows of a rank)
        "self_attn.q_proj": (256, 256, [q, kv, kv]),
        "self_attn.o_proj": (8 * head, 8 * head // ranks, [256]),
        "mlp.gate_proj": (256, 256, [inner // ranks] * 2),
        "mlp.down_proj": (inner, inner // ranks, [256]),
    }
    for linear, (columns, rank_columns, rank_rows) in shards.items():
        fits = all(size % 128 == 0 for size in (rank_columns, *rank_rows))
        assert plan.is_quantized(f"model.layers.0.{linear}.weight") == fits
        if fits:
            rows = sum(rank_rows) * (1 if columns != rank_columns else ranks)
            utils.validate_fp8_block_shape(
                torch.nn.Module(), columns, rows, rank_columns, rank_rows, list(BLOCK_SIZE)
            )
