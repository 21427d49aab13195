"""W8A8 on a CPU computes what `quant` defines, in linears and experts, and survives updates.

Real vLLM models, given weights twice. Exact is a product in float64 of the rounded input and what
the FP8 weight stands for; the kernel may differ from it by the last rounding to BF16 (2^-9) and as
little again for its sum in fp32. Experts pass BF16 between their products, where a value that falls
on the other side of a rounding moves a whole FP8 code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sync.test_engine_state import run

pytestmark = pytest.mark.slow

DENSE, MOE = ("dense", "no kernel"), ("experts", "AVX-512")
OURS = DENSE + MOE
THEIRS = ("vLLM's own", "vLLM's own, AVX-512")


@pytest.fixture(scope="module")
def everything() -> Any:
    return run("engine_w8a8_worker", *OURS, *THEIRS)


@pytest.fixture(params=OURS)
def seen(request: pytest.FixtureRequest, everything: Any) -> Any:
    return everything[request.param]


def test_every_fp8_layer_says_in_what_it_takes_its_input(everything: Any) -> None:
    layers = [f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in ("qkv", "o")]
    dense = [f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate_up", "down")]
    moe = [f"model.layers.{i}.mlp.experts.routed_experts" for i in (0, 1)]
    for case, more in (dict.fromkeys(DENSE, dense) | dict.fromkeys(MOE, moe)).items():
        assert everything[case]["activations"] == dict.fromkeys(sorted(layers + more), "fp8"), case
    for case in THEIRS:
        assert everything[case]["activations"] == dict.fromkeys(sorted(layers + moe), "bf16"), case


def test_linears_compute_what_quant_defines(seen: Any) -> None:
    for errors in seen["linear"]:
        assert errors["of what is allowed"] <= 1
        assert errors["W8A8"] < 2e-3
        assert errors["W8A16"] > 1e-2, "FP8 inputs must show"


@pytest.mark.parametrize("case", MOE)
def test_experts_compute_what_quant_defines_in_both_products(everything: Any, case: str) -> None:
    for errors in everything[case]["experts"]:
        assert errors["W8A8"] < 4e-3
        assert errors["W8A16"] > 2e-2


@pytest.mark.parametrize("case", THEIRS)
def test_without_it_vllm_computes_w8a16(everything: Any, case: str) -> None:
    for errors in everything[case]["linear"] + everything[case]["experts"]:
        assert errors["W8A16"] < 6e-3
        assert errors["W8A8"] > 1e-2


@pytest.mark.parametrize("case", MOE)
def test_experts_that_live_on_another_worker_are_left_to_it(everything: Any, case: str) -> None:
    assert everything[case]["halves"] < 4e-3  # each half is rounded to BF16


def test_without_amx_avx512_computes_and_without_either_the_reference(everything: Any) -> None:
    kernels = {case: everything[case]["kernel"] for case in (*OURS, *THEIRS)}
    assert kernels.pop("no kernel") == "ReferenceKernel"
    assert kernels.pop("AVX-512") == kernels.pop("vLLM's own, AVX-512") == "Avx512Fp8Kernel"
    here = "CPUFp8BlockScaledMMKernel" if torch.cpu._is_amx_tile_supported() else "Avx512Fp8Kernel"
    assert set(kernels.values()) == {here}


def test_updates_are_proven_and_leave_what_a_fresh_model_is(seen: Any) -> None:
    assert seen["differences 1"] == seen["differences 2"] == []
    [flipped] = seen["a byte flipped"]
    assert flipped.startswith("model.layers.1.self_attn.o_proj.weight: 1 of 65536 elements")
    assert seen["like a fresh one"]
