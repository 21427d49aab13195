"""Run in a process of its own: FP8 layers of live vLLM models, as W8A8 and as vLLM has them.

Usage: python -m tests.sync.engine_w8a8_worker CASE [CASE ..]. Prints one JSON object, case -> what
was seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8rl.quant import dequantize_blockwise, quantize_activations
from fp8rl.sync.plugin import W8A8
from tests.sync import engine_models

CASES = {  # -> the model, vLLM's quantization method, whether vLLM's check finds AMX, FP8 kernels
    "dense": ("qwen2", W8A8, None, True),
    "experts": ("qwen3_moe", W8A8, None, True),
    "AVX-512": ("qwen3_moe", W8A8, False, True),
    "no kernel": ("qwen2", W8A8, False, False),
    "vLLM's own": ("qwen3_moe", None, None, True),
    "vLLM's own, AVX-512": ("qwen3_moe", None, False, True),
}
TOKENS = (1, 5, 70)  # the kernel takes another way from some tokens on
LAYER = "model.layers.1"
HAS_AMX = torch.cpu._is_amx_tile_supported


def main(cases: list[str]) -> None:
    print(json.dumps({case: look_at(*CASES[case]) for case in cases}))


def look_at(
    family: str, quantization: str | None, amx: bool | None, kernels: bool
) -> dict[str, Any]:
    """``amx``: None for what this processor has; the operators find out for themselves."""
    from fp8rl.sync.engine_kernels import activations
    from fp8rl.sync.engine_load import CPU_FP8_LINEAR
    from fp8rl.sync.engine_private import fp8_kernel
    from fp8rl.sync.engine_state import differences, load

    os.environ["VLLM_DISABLED_KERNELS"] = "" if kernels else ",".join(CPU_FP8_LINEAR)
    torch.cpu._is_amx_tile_supported = HAS_AMX if amx is None else lambda: amx

    def build() -> engine_models.Live:
        config = engine_models.config(family)
        return engine_models.build(config, "fp8", quantization=quantization)

    live, weights = build(), {}
    found: dict[str, Any] = {"activations": activations(live.model)}
    for seed in (1, 2):
        weights = engine_models.sent(live.plan, seed)
        load(live.model, live.model_config, weights)
        found[f"differences {seed}"] = differences(live.model, weights)
    linear = live.model.model.layers[1].self_attn.o_proj
    found["kernel"] = fp8_kernel(linear)
    found["linear"] = [linear_errors(linear, weights, tokens) for tokens in TOKENS]
    codes = linear.weight.data.view(torch.uint8)
    codes[3, 5] ^= 1
    found["a byte flipped"] = differences(live.model, weights)
    codes[3, 5] ^= 1
    fresh = build()
    load(fresh.model, fresh.model_config, weights)
    x = inputs(70)
    found["like a fresh one"] = torch.equal(*(o_proj(m, x) for m in (live.model, fresh.model)))
    if family == "qwen3_moe":
        found["experts"] = [expert_errors(live.model, weights, tokens) for tokens in TOKENS]
        found["halves"] = halves(live.model) if quantization else None
        chosen, shares = routing(70)
        outputs = (experts(model, x, chosen, shares) for model in (live.model, fresh.model))
        found["like a fresh one"] &= torch.equal(*outputs)
    return found


def inputs(tokens: int) -> Tensor:
    """BF16 [tokens, 256], of tokens and channels of different sizes."""
    generator = torch.Generator().manual_seed(tokens)
    noise, size = torch.randn(2, tokens, 256, generator=generator)
    return (noise * torch.exp(size)).bfloat16()


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """Two of four experts for each token, and their shares."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return chosen.int(), torch.rand(tokens, 2, generator=generator)


def rounded(x: Tensor) -> Tensor:
    return dequantize_blockwise(quantize_activations(x)).double()


def unrounded(x: Tensor) -> Tensor:
    return x.double()


def weight(weights: dict[str, Tensor], name: str) -> Tensor:
    """What a quantized weight stands for, in float64."""
    name = f"{LAYER}.{name}.weight"
    scales = weights[f"{name}_scale_inv"].double()
    return weights[name].double() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def o_proj(model: Any, x: Tensor) -> Tensor:
    linear = model.model.layers[1].self_attn.o_proj
    result: Tensor = linear.quant_method.apply(linear, x)
    return result


def linear_errors(linear: Any, weights: dict[str, Tensor], tokens: int) -> dict[str, float]:
    """How far a linear is from either definition; for W8A8 also in units of what is allowed."""
    x, w = inputs(tokens), weight(weights, "self_attn.o_proj")
    found = linear.quant_method.apply(linear, x).double()
    exact = rounded(x) @ w.T
    allowed = 2.0**-8 * exact.abs() + 2.0**-18 * (rounded(x).abs() @ w.abs().T)
    assert found.is_contiguous(), "vLLM's kernels on a CPU read rows"
    return {
        "W8A8": error(found, exact),
        "W8A16": error(found, unrounded(x) @ w.T),
        "of what is allowed": float(((found - exact).abs() / allowed).max()),
    }


def experts(model: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    module = model.model.layers[1].mlp.experts.routed_experts
    result: Tensor = module.quant_method.apply(module, x, shares, chosen, None, None)
    return result


def expert_errors(model: Any, weights: dict[str, Tensor], tokens: int) -> dict[str, float]:
    x, (chosen, shares) = inputs(tokens), routing(tokens)
    found = experts(model, x, chosen, shares)
    return {
        name: error(found, exact_experts(take, weights, x, chosen, shares))
        for name, take in {"W8A8": rounded, "W8A16": unrounded}.items()
    }


def exact_experts(
    take: Callable[[Tensor], Tensor],
    weights: dict[str, Tensor],
    x: Tensor,
    chosen: Tensor,
    shares: Tensor,
) -> Tensor:
    """The experts' sum in float64 but for what passes between their products, which is BF16."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(4):
        gate, up, down = (
            weight(weights, f"mlp.experts.{expert}.{part}_proj") for part in ("gate", "up", "down")
        )
        g, u = ((take(x) @ w.T).bfloat16() for w in (gate, up))
        share = torch.where(chosen == expert, shares, 0).sum(1, keepdim=True)
        total += share * (take(torch.nn.functional.silu(g) * u) @ down.T)
    return total


def halves(model: Any) -> float:
    """Two workers, each with the routing of its experts alone, beside one with all."""
    module = model.model.layers[1].mlp.experts.routed_experts
    kernel = module.quant_method.moe_kernel.fused_experts
    x, (chosen, shares) = inputs(70), routing(70)
    parts = []
    for start in (0, 2):
        part, scales = slice(start, start + 2), (kernel.w1_scale, kernel.w2_scale)
        mine = torch.full((4,), -1, dtype=torch.int32)
        mine[part] = torch.arange(2, dtype=torch.int32)
        output = torch.empty_like(x)
        held = (module.w13_weight.data[part], module.w2_weight.data[part])
        kernel.quant_config._w1.scale, kernel.quant_config._w2.scale = (s[part] for s in scales)
        kernel.apply(output, x, *held, shares, chosen, None, 4, mine, *[None] * 5, False)
        kernel.quant_config._w1.scale, kernel.quant_config._w2.scale = scales
        parts.append(output.double())
    return error(parts[0] + parts[1], experts(model, x, chosen, shares).double())


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference, of that of what is exact."""
    return float((found.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    main(sys.argv[1:])
