"""W8A8 in an engine on a CPU: what a GPU's FP8 kernels compute, with vLLM's own CPU kernels.

vLLM's blockwise FP8 on a CPU is W8A16: the input of a linear stays BF16, and half of the mismatch
of a GPU run is not there. Here is the other half. An engine that is started with

    quantization="fp8rl-w8a8"          (vllm serve: --quantization fp8rl-w8a8)

from a checkpoint of ``quant_method: fp8`` rounds every input of an FP8 layer to E4M3 in 1 x 128
groups with power-of-two scales (``quant/activations.py``), and then does what it did before:

    linear     y = round(x) W^T                              AMX, as W8A16
    experts    y = sum of p_e round(silu(g) * u) W2_e^T,     [g, u] = round(x) W13_e^T
               each product by the kernel of linears, for the fused one rounds nothing in between

What was rounded is exact in BF16, so is the weight where its scale is a power of two, and the
kernel adds up in fp32: the result is that of an FP8 kernel, up to the order of the sum and the last
rounding to BF16. With other weight scales the kernel rounds each weight to BF16 besides, for
batches of more than a few tokens: 2^-9 of it at most, where FP8 has rounded by 2^-4.

Where a processor has neither AMX nor AVX-512 BF16, linears go through ``ReferenceKernel``: plain
torch, the sum of each group of 128 in fp32, then scaled, as GPU kernels do. Slow; experts have no
such path.

It is a quantization method of vLLM's public registry, so the engine's argument brings it to every
worker. Weights, their layouts and loaders are vLLM's, so updates and read-back are what they were.
Private names: Fp8LinearMethod and Fp8MoEMethod (with ``experts_cls``), CPUExpertsFp8, and for the
reference the list of FP8 block kernels, for which vLLM has no public way; vLLM's version is checked
in ``engine_private.py``. On CUDA nothing of this is registered: kernels there do it themselves.

An FP8 KV cache is rounded as on a GPU too (``engine_kv_round.py``). Left out: BF16 layers and
attention itself, which compute as always; static scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import (
    Fp8Config,
    Fp8KVCacheMethod,
    Fp8LinearMethod,
    Fp8MoEMethod,
)
from vllm.platforms.interface import PlatformEnum

import fp8rl.sync.engine_private  # noqa: F401  # checks vLLM's version
from fp8rl.quant.activations import GROUP, round_activations
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.sync.engine_avx512 import CPUExperts
from fp8rl.sync.engine_kv_round import NearestKVCache
from fp8rl.sync.errors import UnsupportedKernelError
from fp8rl.sync.plugin import W8A8


def register() -> None:
    """Make the method and the reference kernel known to vLLM; a second call changes nothing."""
    register_quantization_config(W8A8)(W8A8Config)
    kernels = _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if ReferenceKernel not in kernels:
        kernels.append(ReferenceKernel)  # the last: taken where no other runs


class W8A8Config(Fp8Config):
    """vLLM's blockwise FP8, with FP8 inputs."""

    @classmethod
    def get_name(cls) -> Any:
        """The name under which it is registered."""
        return W8A8

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Take FP8 checkpoints over where this method was asked for by name, and only there."""
        asked = user_quant == W8A8 and hf_quant_cfg.get("quant_method") == "fp8"
        return W8A8 if asked else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for what vLLM would quantize, vLLM's for the rest."""
        method = super().get_quant_method(layer, prefix)
        if isinstance(method, Fp8LinearMethod):
            return W8A8Linear(self)
        if isinstance(method, Fp8MoEMethod):
            return W8A8Experts(self, layer)
        return NearestKVCache(self) if isinstance(method, Fp8KVCacheMethod) else method


class W8A8Linear(Fp8LinearMethod):
    """A linear whose input is rounded before vLLM's CPU kernel, or the reference, takes it."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """BF16 [.., K] -> BF16 [.., N]."""
        result: Tensor = super().apply(layer, round_activations(x), bias)
        return result


class W8A8Experts(CPUExperts):
    """Experts that are held as vLLM's CPU kernel holds them, and multiplied one by one."""

    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts) -> None:
        super().__init__(quant_config, layer)
        kernel = self.experts_cls
        if kernel is not CPUExpertsFp8 or tuple(self.moe_block_shape) != BLOCK_SIZE:
            found = "no kernel of vLLM's" if kernel is None else f"vLLM's {kernel.__name__}"
            raise UnsupportedKernelError(
                f"{layer.layer_name}: experts with {found} in blocks of {self.moe_block_shape} "
                f"have no W8A8 here; expected CPUExpertsFp8 in blocks of {list(BLOCK_SIZE)}. "
                "Start the engine with BF16 activations"
            )
        self.experts_cls: type[Any] = ExpertsKernel


class ExpertsKernel(CPUExpertsFp8):
    """What vLLM runs for a layer of experts in place of its fused W8A16 operator."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the experts' weighted sum for BF16 [T, K] to ``output`` [T, K].

        topk_weights, topk_ids: [T, k]; an expert that lives on another worker adds nothing.
        """
        if apply_router_weight_on_input:
            raise UnsupportedKernelError("router weights on the experts' input have no W8A8 here")
        chosen = topk_ids if expert_map is None else expert_map[topk_ids]
        held = (w1, self.w1_scale, w2, self.w2_scale)
        compute = _opaque_experts if torch.compiler.is_compiling() else _experts
        compute(output, hidden_states, *held, topk_weights, chosen)


class ReferenceKernel(Fp8BlockScaledMMLinearKernel):
    """An FP8 linear in plain torch, of rounded inputs and of weights as they were stored."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Only in an engine that was asked for W8A8."""
        asked = get_current_vllm_config().model_config.quantization == W8A8
        return asked, None if asked else f"is for quantization={W8A8!r}"

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """Blocks of 128 x 128."""
        fits = tuple(config.weight_quant_key.scale.group_shape) == BLOCK_SIZE
        return fits, None if fits else f"needs blocks of {BLOCK_SIZE}"

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight as it lies."""

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        """BF16 [T, K] by E4M3 [N, K] with fp32 scales [N / 128, K / 128]: fp32 [T, N]."""
        x, w = A.float().view(len(A), -1, GROUP), B.float().view(len(B), -1, GROUP)
        sums = torch.einsum("tgk,ngk->gtn", x, w)
        rows = Bs.repeat_interleave(BLOCK_SIZE[0], dim=0)[: len(B)]
        # contiguous: vLLM's kernels on a CPU read rows, and einsum leaves columns
        return torch.einsum("gtn,ng->tn", sums, rows).contiguous()


def _experts(
    output: Tensor,
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    shares: Tensor,
    chosen: Tensor,
) -> None:
    """Write the weighted sum of this worker's experts; ``chosen`` [T, k] is -1 for another's."""
    order = torch.argsort(chosen.flatten(), stable=True)  # by expert, those of others first
    counts = torch.bincount(chosen.flatten() + 1, minlength=len(w13) + 1).tolist()
    order = order[counts.pop(0) :]
    token = order // chosen.shape[1]
    gate, up = _by_expert(round_activations(x)[token], w13, w13_scale, counts).chunk(2, dim=-1)
    down = _by_expert(round_activations(silu(gate) * up), w2, w2_scale, counts)
    share = shares.flatten()[order].float()[:, None]
    total = torch.zeros(output.shape, dtype=torch.float32)
    output.copy_(total.index_add_(0, token, down * share))


# One operator to torch.compile, which cannot follow how many rows each expert has.
_opaque_experts = torch.library.custom_op("fp8rl::w8a8_experts", _experts, mutates_args=("output",))


def _by_expert(x: Tensor, weights: Tensor, scales: Tensor, counts: list[int]) -> Tensor:
    """Multiply rows sorted by expert, so many of each, by the experts' packed weights."""
    result = x.new_empty(len(x), weights.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            result[rows] = torch.ops._C.fp8_scaled_mm_cpu(
                x[rows], weights[expert], scales[expert], list(BLOCK_SIZE), None, x.dtype, True
            )
            start += count
    return result
