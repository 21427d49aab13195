"""Outlier channels in the K biases of a Qwen2, planted after the warm-up to test numerics.

Small models that learnt for minutes have none. Qwen2.5-7B has them: the norm of its K bias is 605
in the first layer, 921 in the last (github.com/ggml-org/llama.cpp/issues/21385); an FP8 cache made
its sibling's rollouts gibberish (github.com/verl-project/verl/pull/4435). Massive values of K sit
where RoPE hardly turns (arXiv 2502.01563), and so do ours: in the slowest quarter of each key
head's pairs, of random sign and size S/2 to S. The norm of a layer's K bias is then about 0.76 S
times the square root of heads x d / 4: 650 in the demo's model, for S = 150.

    logit(m, n) = q(m) . R(m - n) (k(n) + b) / sqrt(d)  ~  q(m) . (k(n) + b) / sqrt(d)

R is nearly 1 there, so b shifts all logits of a query alike and softmax does not see it: in BF16
the policy is nearly what it was. E4M3 has 3 bits of mantissa: from 64 on its codes are 8 apart,
from 128 on 16, while k varies by about 1 from token to token. So k + b falls on one code or on the
next, and the logit gets a rounding error for k. A power-of-two scale moves no code, and none of a
whole tensor brings them closer.

Left out: layouts. The trainer has one rank.
"""

from __future__ import annotations

import torch

from fp8rl.config.model import ModelConfig
from fp8rl.trainer.megatron import MegatronTrainer


def plant(trainer: MegatronTrainer, shape: ModelConfig, size: float) -> None:
    """Add constants of ``size``/2 to ``size`` and random sign to the slowest channels of K.

    In master weights and in those of the model; the same for every seed of a run.
    """
    state = trainer.state()
    half, pairs = shape.head_dim // 2, shape.head_dim // 8  # a quarter of all pairs
    slowest = [*range(half - pairs, half), *range(2 * half - pairs, 2 * half)]
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.bias"
        bias = state[f"master/{name}"].clone()
        k = bias.view(shape.num_kv_heads, -1, shape.head_dim)[:, -2]  # queries, k, v of each head
        generator = torch.Generator().manual_seed(layer)
        draw = torch.rand(2, shape.num_kv_heads, len(slowest), generator=generator)
        k[:, slowest] += size * (0.5 + 0.5 * draw[0]) * torch.where(draw[1] < 0.5, -1.0, 1.0)
        state |= {f"master/{name}": bias, f"model/{name}": bias.bfloat16()}
    trainer.load_state(state)
