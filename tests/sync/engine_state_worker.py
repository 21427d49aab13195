"""Run in a process of its own: damage a live vLLM model and print what the read-back says.

The model is a Qwen2, which has every kind of tensor: matrices, norms, biases, scales.

Usage: python -m tests.sync.engine_state_worker PRECISION FOLDER. Prints one JSON object,
case -> list of differences.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import helpers
from tests.sync.engine_cases import in_kernel

FAMILY = "qwen2"


def main(precision: str, folder: Path) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from fp8rl.engine.server import EngineServer
    from fp8rl.sync.publisher import Publisher

    settings = helpers.settings(precision, family=FAMILY)
    server = EngineServer(settings.llm_arguments(folder))
    fp8_kv = precision == "fp8-kv"
    with Publisher(settings.plan(), server, kv_layers=helpers.LAYERS if fp8_kv else 0) as publisher:
        for version in (0, 1):
            scales = helpers.scales(version) if fp8_kv else None
            publisher.publish(helpers.source(version, FAMILY), version=version, kv_scales=scales)
        sent = sent_tensors(settings.plan(), seed=1)
        kv_scales = helpers.scales(1).tensors() if fp8_kv else {}
        cases = damages(precision)
        found = server._llm.apply_model(lambda model: examine(model, sent, kv_scales, cases))[0]
        server._llm.apply_model(lambda model: break_a_load(model, sent))
        scales = helpers.scales(2) if fp8_kv else None
        publisher.publish(helpers.source(2, FAMILY), version=2, kv_scales=scales)  # proves itself
        found["healed after a load that broke"] = []
    print(json.dumps(found))


def sent_tensors(plan: Any, seed: int) -> dict[str, torch.Tensor]:
    from fp8rl.quant import quantize_blockwise

    sent = {}
    for name, tensor in helpers.weights(seed, FAMILY).items():
        if plan.is_quantized(name):
            quantized = quantize_blockwise(tensor)
            sent |= {name: quantized.data, f"{name}_scale_inv": quantized.scale_inv}
        else:
            sent[name] = tensor
    return sent


def damages(precision: str) -> dict[str, Callable[[Any], Callable[[], None]]]:
    """Case -> (model -> damages it and returns how to undo that)."""
    qkv = lambda m: m.model.layers[1].self_attn.qkv_proj  # noqa: E731
    cases = {
        "first bias of a fused linear": lambda m: element(qkv(m).bias.data),
        "last bias of a fused linear": lambda m: element(qkv(m).bias.data[-1:]),
        "norm": lambda m: element(m.model.layers[0].input_layernorm.weight.data),
        "embedding": lambda m: element(m.model.embed_tokens.weight.data),
        "head's copy in the kernel": in_kernel(lambda m: m.lm_head),
    }
    if precision == "bf16":
        return cases | {"linear's copy in the kernel": in_kernel(qkv)}
    layer = lambda m: m.model.layers[1]  # noqa: E731
    cases |= {
        "first part of a fused linear": lambda m: row(qkv(m), 0),
        "last part of a fused linear": lambda m: row(qkv(m), -1),
        "scales of up_proj": lambda m: element(layer(m).mlp.gate_up_proj.weight_scale_inv.data[-1]),
    }
    if precision == "fp8-kv":
        attn = lambda m: layer(m).self_attn.attn  # noqa: E731
        cases |= {
            "k scale on the device": lambda m: element(attn(m)._k_scale.reshape(1)),
            "v scale's CPU copy": lambda m: element(attn(m)._v_scale_cpu.reshape(1)),
            "q scale's float mirror": lambda m: attribute(attn(m), "_q_scale_float", 1.0),
            "k scale's float mirror": lambda m: attribute(attn(m), "_k_scale_float", 1.0),
        }
    return cases


def examine(
    model: Any,
    sent: dict[str, torch.Tensor],
    kv_scales: dict[str, torch.Tensor],
    cases: dict[str, Any],
) -> dict[str, Any]:
    from fp8rl.sync.engine_scales import scale_differences
    from fp8rl.sync.engine_state import differences

    def problems() -> list[str]:
        return differences(model, sent) + scale_differences(model, kv_scales)

    found = {"untouched": problems()}
    for case, damage in cases.items():
        undo = damage(model)
        found[case] = problems()
        undo()
    found["restored"] = problems()
    return found


def break_a_load(model: Any, sent: dict[str, torch.Tensor]) -> None:
    """Leave a load half done, as a stream that ends early does, and clean up after it."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    from fp8rl.sync.engine_state import abandon_reload

    initialize_layerwise_reload(model)
    model.load_weights(iter(list(sent.items())[: len(sent) // 2]))
    assert any(parameter.is_meta for parameter in model.parameters())
    abandon_reload(model)
    assert not any(parameter.is_meta for parameter in model.parameters())


def element(tensor: torch.Tensor) -> Callable[[], None]:
    flat = tensor.view(-1)
    before = flat[0].clone()
    flat[0] = before + 1
    return lambda: flat[0].copy_(before)


def row(linear: Any, index: int) -> Callable[[], None]:
    data = linear.weight.data.view(torch.uint8)[index]
    before = data[5].clone()
    data[5] ^= 1
    return lambda: data[5].copy_(before)


def attribute(owner: Any, name: str, value: float) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
