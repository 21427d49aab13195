"""FP8 weights on a CPU without AMX: vLLM's own kernels, where its check asks for too much.

vLLM 0.32 offers its blockwise FP8 kernels for linears and experts to processors with AMX tiles
alone (Intel, from Sapphire Rapids on). The operators themselves also run with AVX-512 BF16, which
AMD has from Zen 4 on, and give the same products, up to the order of the sum: the tests of
``engine_w8a8.py`` compare them with float64 wherever they run. So here:

    linears   the kernel class once more, with the right check, appended to vLLM's list
    experts   vLLM finds no backend and leaves the layer without one; the method gets vLLM's CPU one

A model whose checkpoint says ``quant_method: fp8`` is then loaded as with AMX, nothing to ask for.
Processors with AMX, and CUDA, never come here.

Private names: as in ``engine_w8a8.py``, and Fp8MoeBackend. Left out: processors without AVX-512
BF16, for which vLLM has no FP8 product at all; with FP8 activations ``ReferenceKernel`` does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.platforms.interface import PlatformEnum

import fp8rl.sync.engine_private  # noqa: F401  # checks vLLM's version
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.sync.plugin import W8A16


def needed() -> bool:
    """Whether this processor has no AMX, and AVX-512 BF16 in its place."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def register() -> None:
    """Make the kernel and the method known to vLLM; a second call changes nothing."""
    register_quantization_config(W8A16)(W8A16Config)
    kernels = _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if Avx512Fp8Kernel not in kernels:
        kernels.append(Avx512Fp8Kernel)


class Avx512Fp8Kernel(CPUFp8BlockScaledMMKernel):
    """vLLM's FP8 linear for CPUs, W8A16, where AVX-512 BF16 computes it."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Where vLLM's own check refuses for want of AMX alone."""
        if needed() and ops._supports_cpu_fp8_w8a16:
            return True, None
        return False, "is for CPUs with AVX-512 BF16 and without AMX"


class CPUExperts(Fp8MoEMethod):
    """vLLM's FP8 experts, with its CPU kernels also where it offers none for want of AMX."""

    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts) -> None:
        super().__init__(quant_config, layer)
        fits = tuple(self.moe_block_shape or ()) == BLOCK_SIZE
        if self.experts_cls is None and needed() and fits:
            self.fp8_backend: Any = Fp8MoeBackend.CPU
            self.experts_cls: Any = CPUExpertsFp8


class W8A16Config(Fp8Config):
    """vLLM's blockwise FP8, with ``CPUExperts``."""

    @classmethod
    def get_name(cls) -> Any:
        """The name under which it is registered."""
        return W8A16

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Take FP8 checkpoints over on processors that need it, unless another was asked for."""
        asked = user_quant in (None, "fp8", W8A16) and hf_quant_cfg.get("quant_method") == "fp8"
        return W8A16 if asked and needed() else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for experts, vLLM's for the rest."""
        method = super().get_quant_method(layer, prefix)
        return CPUExperts(self, layer) if isinstance(method, Fp8MoEMethod) else method
