"""The audit names every tensor on which plan and engine disagree, once, and no other."""

import pytest
import torch

from fp8rl.quant import EngineTensor, QuantPlan, kv_scale_name

from .plan_models import TINY

PLAN = QuantPlan.from_hf_config(TINY["qwen3-moe"], keep_first_layers=1)
UP = "model.layers.2.mlp.experts.3.up_proj.weight"
KEPT = "model.layers.0.self_attn.o_proj.weight"
ROUTER = "model.layers.2.mlp.gate.weight"
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


def engine(*without: str, **changed: EngineTensor) -> list[EngineTensor]:
    """What an engine reports that agrees with the plan but for these."""
    same = [t for t in PLAN.engine_tensors() if t.name not in without]
    return [*same, *changed.values()]


def audit(found: list[EngineTensor]) -> list[tuple[str, str]]:
    return [(d.name, d.kind) for d in PLAN.audit(found)]


def test_an_engine_as_planned_has_no_difference_in_any_order():
    assert PLAN.audit(reversed(engine())) == []


def test_kv_scales_are_no_concern_of_the_plan():
    scales = [EngineTensor(kv_scale_name(0, x), torch.float32, (1,)) for x in ("q", "k", "v")]
    assert audit([*engine(), *scales]) == []


def test_a_layer_left_in_bf16_is_named_once():
    found = engine(UP, f"{UP}_scale_inv", up=EngineTensor(UP, BF16, (128, 256)))
    assert audit(found) == [(UP, "precision")]
    assert str(PLAN.audit(found)[0]) == (
        f"{UP}: torch.bfloat16 in the engine, planned torch.float8_e4m3fn"
    )


@pytest.mark.parametrize("name", [KEPT, ROUTER])
def test_a_layer_quantized_against_the_plan_is_named_once(name):
    scales = EngineTensor(f"{name}_scale_inv", torch.float32, (2, 2))
    found = engine(name, w=EngineTensor(name, FP8, PLAN.entry(name).shape), s=scales)
    assert audit(found) == [(name, "precision")]


@pytest.mark.parametrize("name", [UP, KEPT])
def test_a_missing_layer_is_named_once(name):
    assert audit(engine(name, f"{name}_scale_inv")) == [(name, "missing")]


def test_an_unexpected_layer_is_named_once():
    name = "model.layers.3.mlp.up_proj.weight"
    extra = EngineTensor(name, FP8, (128, 128))
    scales = EngineTensor(f"{name}_scale_inv", torch.float32, (1, 1))
    assert audit(engine(w=extra, s=scales)) == [(name, "unexpected")]


def test_scales_that_fit_no_planned_block_are_named():
    scales = f"{UP}_scale_inv"
    assert audit(engine(scales)) == [(scales, "scales")]
    per_row = EngineTensor(scales, torch.float32, (128, 1))
    assert (
        "float32 [128, 1] in the engine, planned float32 [1, 2], for blocks of [128, 128]"
        in str(PLAN.audit(engine(scales, s=per_row))[0])
    )
    e8m0 = EngineTensor(scales, torch.float8_e8m0fnu, (1, 2))
    assert audit(engine(scales, s=e8m0)) == [(scales, "scales")]


def test_scales_without_a_weight_are_unexpected():
    lone = "model.layers.9.mlp.up_proj.weight_scale_inv"
    found = audit(engine(s=EngineTensor(lone, torch.float32, (1, 1))))
    assert found == [(lone, "unexpected")]


def test_shape_and_dtype_of_the_tensor_itself_are_named():
    assert audit(engine(UP, w=EngineTensor(UP, FP8, (256, 256)))) == [(UP, "shape")]
    fp32 = EngineTensor(ROUTER, torch.float32, (4, 256))
    assert audit(engine(ROUTER, w=fp32)) == [(ROUTER, "dtype")]


def test_every_difference_is_named_in_the_plans_order():
    names = [e.name for e in PLAN.entries]
    extra = EngineTensor("x.weight", BF16, (1,))
    assert audit([extra]) == [*((name, "missing") for name in names), ("x.weight", "unexpected")]
