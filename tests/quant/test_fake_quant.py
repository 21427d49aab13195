"""Fake-quantized linears compute with the published bytes, and learn straight through them."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8rl.quant import (
    FakeQuantError,
    QuantizedTensor,
    QuantPlan,
    dequantize_blockwise,
    fake_quantize,
    hugging_face_linears,
)
from fp8rl.sync.publisher import Publisher
from fp8rl.sync.source import IterableSource
from tests import helpers
from tests.sync.test_publisher import Recorder

from .fake_linear import NAME, attach, computed_with, linear, oracle

# What is computed with


@pytest.fixture(scope="module")
def qwen3():
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**helpers.hf_config()))
    model.load_state_dict(helpers.weights(0))
    return model.bfloat16()


def published(plan: QuantPlan, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the publisher sends to an engine, by name."""
    recorder = Recorder(plan)
    with Publisher(plan, recorder) as publisher:
        publisher.publish(IterableSource(weights), version=0, kv_scales=None)
    return recorder.tensors


def read_back(sent: dict[str, Tensor], name: str) -> Tensor:
    q = QuantizedTensor(sent[name], sent[f"{name}_scale_inv"], (128, 128), "pow2")
    return dequantize_blockwise(q)


@pytest.mark.parametrize("keep_first_layers", [0, 1])
def test_every_linear_computes_with_the_bytes_that_are_published(qwen3, keep_first_layers):
    plan = QuantPlan.from_hf_config(helpers.hf_config(), keep_first_layers=keep_first_layers)
    sent = published(plan, dict(qwen3.state_dict()))
    found = {}
    attached = fake_quantize(hugging_face_linears(qwen3, plan), plan, activations=None)
    assert set(attached.names) == {e.name for e in plan.entries if e.quantized}
    for name, module in qwen3.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{name}.weight"] = computed_with(module, module.in_features)
    attached.remove()
    assert len(found) == 7 * helpers.LAYERS + 1  # the head too
    for name, weight in found.items():
        expected = read_back(sent, name) if plan.is_quantized(name) else sent[name]
        assert torch.equal(weight, expected), name
        assert torch.equal(weight, qwen3.get_parameter(name)) == (not plan.is_quantized(name))


def test_the_model_computes_what_one_of_the_published_weights_does(qwen3):
    plan = QuantPlan.from_hf_config(helpers.hf_config())
    sent = published(plan, dict(qwen3.state_dict()))
    engine = copy.deepcopy(qwen3)
    for entry in plan.entries:
        if entry.quantized:
            engine.get_parameter(entry.name).data.copy_(read_back(sent, entry.name))
    tokens = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        plain, expected = qwen3(tokens).logits, engine(tokens).logits
        attached = fake_quantize(hugging_face_linears(qwen3, plan), plan, activations=None)
        found = qwen3(tokens).logits
        attached.remove()
        after = qwen3(tokens).logits
    assert torch.equal(found, expected) and not torch.equal(found, plain)
    assert torch.equal(after, plain)


def test_a_planned_tensor_that_is_no_linear_of_the_model_is_named(qwen3):
    deeper = QuantPlan.from_hf_config(helpers.hf_config() | {"num_hidden_layers": 3})
    with pytest.raises(FakeQuantError, match=r"layers\.2\.self_attn\.q_proj\.weight.*NoneType"):
        hugging_face_linears(qwen3, deeper)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    exponent=st.integers(-30, 20),
    scale_format=st.sampled_from([None, "pow2", "fp32"]),
)
def test_the_output_is_that_of_both_operands_quantized(shape, exponent, scale_format):
    n, k = shape
    module = linear(n, k, bias=True, dtype=torch.float32)
    module.weight.data *= 2.0**exponent
    x = torch.randn(3, 2, k)
    attach(module, activations=scale_format, fp32_as="master")
    w = oracle(module.weight.detach().numpy(), (128, 128), "pow2")
    rows = x.reshape(6, k).numpy()
    rounded = rows if scale_format is None else oracle(rows, (1, 128), scale_format)
    expected = rounded @ w.T + module.bias.detach().double().numpy()
    bound = np.abs(rounded) @ np.abs(w.T) + 1
    assert (np.abs(module(x).detach().reshape(6, n).numpy() - expected) < 1e-5 * bound).all()


@pytest.mark.parametrize("fp32_as", ["master", "export"])
def test_fp32_weights_are_taken_as_they_are_published(fp32_as):
    module = linear(128, 256, dtype=torch.float32)
    weight = module.weight.detach()
    attach(module, fp32_as=fp32_as)
    values = weight if fp32_as == "master" else weight.bfloat16().float()
    expected = torch.from_numpy(oracle(values.numpy(), (128, 128), "pow2")).float()
    assert torch.equal(module(torch.eye(256)).T, expected)


def test_fp32_weights_need_the_choice():
    module = linear(128, 128, dtype=torch.float32)
    attach(module)
    with pytest.raises(ValueError, match=rf"{NAME}: is fp32.*fp32_as='master'"):
        module(torch.ones(1, 128))


# How it learns


@pytest.mark.parametrize("scale_format", [None, "pow2", "fp32"])
def test_gradients_are_those_of_the_straight_through_reference(scale_format):
    module = linear(160, 200, bias=True, dtype=torch.float32)
    attach(module, activations=scale_format, fp32_as="master")
    x, g = torch.randn(4, 5, 200, requires_grad=True), torch.randn(4, 5, 160)
    module(x).backward(g)

    rows, out = x.detach().reshape(20, 200).numpy(), g.reshape(20, 160).double().numpy()
    w = oracle(module.weight.detach().numpy(), (128, 128), "pow2")
    rounded = rows if scale_format is None else oracle(rows, (1, 128), scale_format)
    for found, expected in {
        module.weight.grad: out.T @ rounded,
        x.grad.reshape(20, 200): out @ w,
        module.bias.grad: out.sum(0),
    }.items():
        assert np.allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_values_at_the_end_of_the_range_stay_finite_and_still_learn(scale_format, steps):
    """448 * 2^k and its neighbours: nothing overflows, and no gradient is clipped away."""
    top = (torch.tensor(448.0).view(torch.int32) + steps).view(torch.float32)
    module = linear(128, 128, dtype=torch.float32)
    module.weight.data[0] = top
    x = torch.ones(2, 128)
    x[:, 3] = 8 * top
    x.requires_grad_()
    attach(module, activations=scale_format, fp32_as="master")
    y = module(x)
    w = oracle(module.weight.detach().numpy(), (128, 128), "pow2")
    rounded = oracle(x.detach().numpy(), (1, 128), scale_format)
    assert np.allclose(y.detach().numpy(), rounded @ w.T, rtol=1e-5, atol=0.1)
    y.sum().backward()
    expected = torch.from_numpy(rounded.sum(0)).float().expand(128, 128)
    assert torch.allclose(module.weight.grad, expected)
    assert np.allclose(x.grad.numpy(), w.sum(0), rtol=1e-4)


def test_micro_batches_add_up_and_held_weights_change_no_bit():
    one, other = linear(256, 128), linear(256, 128)
    parts = torch.randn(3, 8, 128, dtype=torch.bfloat16)
    attached = [attach(one), attach(other)]
    for x in parts:
        one(x).sum().backward()
    with attached[1].held():
        for x in parts:
            other(x).sum().backward()
    assert torch.equal(one.weight.grad, other.weight.grad)
    expected = parts.double().sum((0, 1)).expand(256, 128)
    assert torch.allclose(one.weight.grad.double(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(use_reentrant):
    module, twin = linear(128, 128), linear(128, 128)
    attached = [attach(one, activations="pow2") for one in (module, twin)]
    x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    with attached[1].held():
        y = checkpoint(twin, x_twin, use_reentrant=use_reentrant)
        y.square().sum().backward()
    assert torch.equal(module.weight.grad, twin.weight.grad)
    assert torch.equal(x.grad, x_twin.grad)


def test_a_frozen_weight_gets_no_gradient_but_its_input_does():
    module = linear(128, 128)
    module.weight.requires_grad_(False)
    attach(module)
    x = torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)
    module(x).sum().backward()
    assert module.weight.grad is None
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_after_an_optimizers_step_the_new_weights_are_quantized():
    module = linear(128, 128)
    attach(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    before = computed_with(module, 128)
    module(torch.ones(1, 128, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    expected = oracle(module.weight.detach().float().numpy(), (128, 128), "pow2")
    assert torch.equal(computed_with(module, 128).double(), torch.from_numpy(expected))
    assert not torch.equal(computed_with(module, 128), before)
