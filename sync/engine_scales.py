"""The KV scales of a live vLLM model: the one place that writes and reads them.

vLLM keeps each scale several times, and which copy counts depends on the attention backend:

    _q_scale, _k_scale, _v_scale           fp32 scalars on the device: FlashAttention, Triton
    _q_scale_float, ...                    Python floats: the CPU backend, FlashInfer
    _k_scale_cpu, _v_scale_cpu             CPU tensors: fused ROCm kernels
    impl.bmm1_scale, impl.bmm2_scale       FlashInfer's products of the floats, made once

vLLM's loader sets them for FP8 weights alone: for BF16 weights it drops the names silently, and
each reload sets everything to 1.0. So they are written here for every combination, in place (a
captured CUDA graph holds the address), and read back. What cannot be set for certain is refused
when the engine starts: attention that is no ``Attention`` (MLA: scales mean something else),
scales of each head or token, and backends whose Python floats are baked into a full CUDA graph.

Private names of vLLM: those above and ``_o_scale_float``. ``refuse_unsupported`` checks that each
layer has them; a test holds ``READS`` against the source of the installed backends. Left out:
backends not in ``READS`` (ROCm's, composites), whose way of reading scales nobody has checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import CompilationConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache

from fp8rl.quant import E4M3_MAX, QKV, KVScales, LayerScales, TensorScale
from fp8rl.sync.admission import shown
from fp8rl.sync.errors import UnsupportedAttentionError

E4M3_CACHES = ("fp8", "fp8_e4m3")
HOST_COPIES = ("k", "v")  # vLLM keeps no CPU copy of q's
COPY_NAMES = ("device scale", "float mirror", "CPU copy")

# What each backend (its file in vllm.v1.attention.backends) reads: scalars on the device, which a
# captured graph reads anew, or Python floats, which it bakes in.
READS: dict[str, frozenset[str]] = {
    "b12x": frozenset({"device"}),
    "cpu_attn": frozenset({"float"}),
    "flash_attn": frozenset({"device"}),
    "flash_attn_diffkv": frozenset({"device"}),
    "flashinfer": frozenset({"device", "float"}),
    "triton_attn": frozenset({"device"}),
    "triton_attn_diffkv": frozenset({"device"}),
}
_BACKENDS = "vllm.v1.attention.backends."


def has_fp8_cache(module: nn.Module) -> bool:
    """Whether a module is an attention layer whose cache is E4M3 and takes q, k and v scales."""
    return isinstance(module, Attention) and module.kv_cache_dtype in E4M3_CACHES


def fp8_attention(model: nn.Module) -> dict[str, Attention]:
    """Every attention layer that takes scales, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if has_fp8_cache(module)}


def write_scales(model: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Set every copy of every scale; ``scales`` are fp32 [1], by name, one for each that is taken.

    The softmax scale, which nobody measures, is set to 1: a dummy load leaves a random one.
    """
    for prefix, layer in fp8_attention(model).items():
        layer._prob_scale.fill_(1.0)
        for x in QKV:
            value = float(scales[f"{prefix}.{x}_scale"])
            getattr(layer, f"_{x}_scale").fill_(value)
            setattr(layer, f"_{x}_scale_float", value)
            if x in HOST_COPIES:
                getattr(layer, f"_{x}_scale_cpu").fill_(value)
        if hasattr(layer.impl, "bmm1_scale"):  # FlashInfer derives what is None in its next forward
            layer.impl.bmm1_scale = layer.impl.bmm2_scale = layer.impl.o_sf_scale = None
            layer._o_scale_float = None  # bmm2 is divided by it only when it is found


def read_scales(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """Read every copy: layer -> q, k or v -> [device, float mirror, and for k and v CPU copy]."""
    return {
        prefix: {x: _copies(layer, x) for x in QKV}
        for prefix, layer in fp8_attention(model).items()
    }


def held_scales(model: nn.Module, version: int) -> KVScales:
    """The scales that the model computes with, as those of ``version``."""
    layers = [
        LayerScales(*(TensorScale(copies[x][0], E4M3_MAX * copies[x][0]) for x in QKV))
        for copies in read_scales(model).values()
    ]
    return KVScales(version, "held by the engine", 1, 1.0, tuple(layers))


def scale_differences(model: nn.Module, scales: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare every copy with what it should be; one line for each scale that differs."""
    held = {
        f"{prefix}.{x}_scale": copies
        for prefix, layer in read_scales(model).items()
        for x, copies in layer.items()
    }
    problems = [
        f"{name}: published {float(scale)}, the engine holds {_described(held[name])}"
        for name, scale in scales.items()
        if name in held and any(copy != float(scale) for copy in held[name])
    ]
    problems += [f"{name}: the engine holds no such scale" for name in scales if name not in held]
    return problems + [f"{name}: never published" for name in held if name not in scales]


def refuse_unsupported(model: nn.Module, compilation: CompilationConfig) -> None:
    """Refuse, when the engine starts, attention whose scales cannot be set for certain.

    Raises:
        UnsupportedAttentionError: names the layers, the backend, what is wrong and the remedy.
    """
    found = _odd_layers(model) | _odd_copies(model) | _odd_backends(model, compilation)
    if fp8_attention(model) and current_platform.is_fp8_fnuz():
        problem = (
            "this platform's FP8 is E4M3 FNUZ, whose largest number is 240; KV scales are made for "
            "448. Use kv_cache_dtype='auto'."
        )
        found[problem] = list(fp8_attention(model))
    if found:
        raise UnsupportedAttentionError(
            " ".join(f"{problem} Layers: {shown(layers)}." for problem, layers in found.items())
        )


def _copies(layer: Attention, x: str) -> list[float]:
    held = [float(getattr(layer, f"_{x}_scale")), float(getattr(layer, f"_{x}_scale_float"))]
    return [*held, float(getattr(layer, f"_{x}_scale_cpu"))] if x in HOST_COPIES else held


def _described(copies: list[float]) -> str:
    named = zip(COPY_NAMES, copies, strict=False)
    return ", ".join(f"{name} {value}" for name, value in named)


def _odd_layers(model: nn.Module) -> dict[str, list[str]]:
    """Layers with a quantized cache that is no E4M3 one of ``Attention``: problem -> names."""
    found: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        dtype = str(getattr(module, "kv_cache_dtype", "auto"))
        if not isinstance(module, AttentionLayerBase) or not is_quantized_kv_cache(dtype):
            continue
        kind = type(module).__name__
        if not isinstance(module, Attention):
            problem = (
                f"{kind} keeps an {dtype} cache that is not one of q, k and v, so KV scales "
                "mean something else there. Use kv_cache_dtype='auto'."
            )
        elif dtype not in E4M3_CACHES:
            problem = (
                f"kv_cache_dtype {dtype!r} does not take one E4M3 scale for each of q, k and v. "
                "Use 'fp8' or 'auto'."
            )
        elif module.kv_sharing_target_layer_name is not None:
            problem = (
                "these layers read another layer's FP8 cache, which was written under its scales. "
                "Use kv_cache_dtype='auto'."
            )
        else:
            continue
        found.setdefault(problem, []).append(prefix)
    return found


def _odd_copies(model: nn.Module) -> dict[str, list[str]]:
    """Layers whose scales are not kept as this file expects: problem -> names."""
    found: dict[str, list[str]] = {}
    for prefix, layer in fp8_attention(model).items():
        mirrors = [f"_{x}_scale_float" for x in QKV] + [f"_{x}_scale_cpu" for x in HOST_COPIES]
        for name in [f"_{x}_scale" for x in QKV] + mirrors:
            problem = _odd_copy(name, getattr(layer, name, None))
            if problem:
                found.setdefault(problem, []).append(prefix)
    return found


def _odd_copy(name: str, held: Any) -> str | None:
    if name.endswith("_float") and isinstance(held, float):
        return None
    if isinstance(held, torch.Tensor) and held.numel() > 1:
        return f"{name} holds {held.numel()} scales, one for each head; fp8rl sets one a tensor."
    if isinstance(held, torch.Tensor) and held.dtype == torch.float32:
        return None
    return f"{name} is {held!r}, not one fp32 scale; this vLLM keeps its scales in another way."


def _odd_backends(model: nn.Module, compilation: CompilationConfig) -> dict[str, list[str]]:
    """Layers whose backend cannot be trusted to read new scales: problem -> names."""
    captured = _captures_attention(compilation)
    found: dict[str, list[str]] = {}
    for prefix, layer in fp8_attention(model).items():
        backend = type(layer.impl).__module__.removeprefix(_BACKENDS)
        reads = READS.get(backend)
        if reads is None:
            problem = (
                f"attention backend {backend!r} may keep old KV scales: how it reads them has not "
                f"been checked. Use one of {sorted(READS)}, or kv_cache_dtype='auto'."
            )
        elif captured and "float" in reads:
            problem = (
                f"attention backend {backend!r} reads KV scales as Python floats, which the CUDA "
                f"graphs of cudagraph_mode={compilation.cudagraph_mode} bake in. Start the engine "
                "with compilation_config={'cudagraph_mode': 'PIECEWISE'} or enforce_eager=True, or "
                "use a backend that reads tensors, such as FLASH_ATTN."
            )
        else:
            continue
        found.setdefault(problem, []).append(prefix)
    return found


def _captures_attention(compilation: CompilationConfig) -> bool:
    """Whether CUDA graphs hold the attention itself, not only what lies between."""
    mode, splits = compilation.cudagraph_mode, compilation.splitting_ops
    in_pieces = bool(splits) and not compilation.splitting_ops_contain_attention()
    return bool(mode.has_full_cudagraphs() or (mode.has_piecewise_cudagraphs() and in_pieces))
