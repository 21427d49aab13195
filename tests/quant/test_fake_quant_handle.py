"""Fake quantization quantizes when it must, goes away without a trace, and refuses by name."""

import copy
import math

import pytest
import torch
from torch import nn

from fp8rl.quant import (
    FakeQuantError,
    NonFiniteActivationError,
    NonFiniteWeightError,
    QuantPlan,
    TrainerLinear,
    fake_quant,
    fake_quantize,
)

from .fake_linear import NAME, attach, computed_with, linear, plan_of

# How often it quantizes


@pytest.fixture
def casts(monkeypatch):
    """Names of the weights quantized, in order."""
    real, names = fake_quant.quantize_blockwise, []

    def counted(weight, *, name, **options):
        names.append(name)
        return real(weight, name=name, **options)

    monkeypatch.setattr(fake_quant, "quantize_blockwise", counted)
    return names


def test_a_held_weight_is_quantized_once(casts):
    module, x = linear(128, 128), torch.ones(1, 128, dtype=torch.bfloat16)
    attached = attach(module)
    for _ in range(2):
        with attached.held():
            for _ in range(3):
                module(x)
    assert casts == [NAME] * 2
    module(x), module(x)
    assert casts == [NAME] * 4


def test_a_weight_that_changes_while_held_is_an_error():
    module, x = linear(128, 128), torch.ones(1, 128, dtype=torch.bfloat16)
    attached = attach(module)
    with attached.held():
        module(x)
        with torch.no_grad():
            module.weight.mul_(2)
        with pytest.raises(FakeQuantError, match=rf"{NAME} changed inside held"):
            module(x)
    assert module(x).isfinite().all()


# How it goes away


def test_parameters_and_state_see_nothing_and_removal_restores_every_bit():
    module, x = linear(256, 128, bias=True), torch.randn(4, 128, dtype=torch.bfloat16)
    weight, state = module.weight, {n: t.clone() for n, t in module.state_dict().items()}
    names, own = [n for n, _ in module.named_parameters()], dict(vars(module))
    before = module(x)
    attached = attach(module, activations="pow2")
    during = module(x)
    assert module.weight is weight and [n for n, _ in module.named_parameters()] == names
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(state[n], t) for n, t in module.state_dict().items())
    attached.remove()
    attached.remove()  # does nothing more
    assert attached.names == ()
    assert vars(module).keys() == own.keys() and module.weight is weight
    assert torch.equal(module(x), before) and not torch.equal(during, before)


def test_gradients_after_removal_are_those_of_a_linear_never_touched():
    module, twin = linear(128, 128), linear(128, 128)
    attach(module).remove()
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    for one in (module, twin):
        one(x).square().sum().backward()
    assert torch.equal(module.weight.grad, twin.weight.grad)


def test_a_forward_of_the_instance_comes_back():
    module, x = linear(128, 128), torch.ones(1, 128, dtype=torch.bfloat16)
    plain = module.forward
    module.forward = lambda x: plain(x) + 1
    before = module(x)
    attach(module).remove()
    assert torch.equal(module(x), before)


def test_a_forward_that_was_wrapped_since_is_not_overwritten():
    module = linear(128, 128)
    attached, ours = attach(module), module.forward
    module.forward = lambda x: ours(x) + 1
    with pytest.raises(FakeQuantError, match=rf"{NAME} was replaced"):
        attached.remove()
    module.forward = ours
    attached.remove()
    assert "forward" not in vars(module)


def test_a_copy_computes_with_its_own_weights():
    module = linear(128, 128)
    attach(module)
    twin, before = copy.deepcopy(module), computed_with(module, 128)
    twin.weight.data.mul_(4)
    assert torch.equal(computed_with(twin, 128), 4 * before)
    assert torch.equal(computed_with(module, 128), before)


def test_the_weight_stands_again_after_an_error():
    module = linear(128, 128)
    weight = module.weight
    attach(module)
    with pytest.raises(RuntimeError, match="shape"):
        module(torch.ones(1, 64, dtype=torch.bfloat16))
    assert module.weight is weight


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_named(value):
    module, x = linear(128, 128), torch.ones(2, 128, dtype=torch.bfloat16)
    attach(module, activations="pow2")
    bad = x.clone()
    bad[1, 7] = value
    with pytest.raises(NonFiniteActivationError, match=r"activations: 1 .*index \[1, 7\]"):
        module(bad)
    module.weight.data[3, 5] = value
    with pytest.raises(NonFiniteWeightError, match=rf"{NAME}: 1 .*index \[3, 5\]"):
        module(x)


def test_what_cannot_be_fake_quantized_is_refused_and_nothing_is_attached():
    good, name = linear(128, 128), NAME
    whole = {name: torch.arange(128)}
    plan = plan_of((128, 128))

    def refused(message: str, *linears: TrainerLinear, plan: QuantPlan = plan) -> None:
        with pytest.raises(ValueError, match=message):
            fake_quantize(linears, plan, activations=None)
        assert "forward" not in vars(good)

    refused("with a weight .*found LayerNorm", TrainerLinear(nn.LayerNorm(128), whole))
    refused("with a weight .*None", TrainerLinear(nn.Identity(), whole))
    short = {name: torch.arange(127)}
    refused("the 127 rows given are not the 128 rows", TrainerLinear(good, short))
    twice = {name: torch.arange(128).clamp(max=126)}
    refused("not the 128 rows of the weight, each once", TrainerLinear(good, twice))
    refused("was given twice", TrainerLinear(good, whole), TrainerLinear(good, whole))
    unknown = {"model.layers.0.mlp.dawn_proj.weight": torch.arange(128)}
    refused("dawn_proj", TrainerLinear(good, unknown))
    fused = {name: torch.arange(64), f"{name}.1": torch.arange(64, 128)}
    mixed = plan_of((64, 128), (64, 128), kept=(name,))
    refused("one precision", TrainerLinear(good, fused), plan=mixed)
    straddles = r"this rank holds \(128, 64\) of it.*straddles ranks"
    half = linear(128, 64)
    refused(straddles, TrainerLinear(good, whole), TrainerLinear(half, whole))
    refused("no equal cut", TrainerLinear(good, whole), plan=plan_of((320, 128)))
    refused("no equal cut", TrainerLinear(good, whole), plan=plan_of((256, 256)))
    fusing = linear(128, 128)
    fusing.gradient_accumulation_fusion = True
    refused("gradient_accumulation_fusion=False", TrainerLinear(fusing, whole))
    attach(good)
    with pytest.raises(FakeQuantError, match="fake-quantized already"):
        attach(good)


def test_kept_linears_are_left_alone():
    module = linear(128, 128)
    plan = plan_of((128, 128), kept=(NAME,))
    rows = {NAME: torch.arange(128)}
    attached = fake_quantize([TrainerLinear(module, rows)], plan, activations="pow2")
    assert attached.names == () and "forward" not in vars(module)


def test_an_input_that_cannot_be_found_is_an_error():
    module = linear(128, 128)
    attach(module, activations="pow2")
    with pytest.raises(FakeQuantError, match="first argument"):
        module(input=torch.ones(1, 128, dtype=torch.bfloat16))
