"""Load new weights into a live vLLM model: whole units, by vLLM's own layerwise reload.

vLLM reloads a module in four steps: its kernel tensors are set aside, its parameters become meta
tensors with loaders that only collect; once all its elements came, it is materialized, loaded and
processed like at the start; the result is copied into the kernel tensors, which keep their
addresses. It is asked to do so for the modules that get new weights and for no other: the rest, the
attention layers with their KV scales too, is not touched.

Three things it leaves undone on 0.32, each found by comparing with a fresh engine:

* BF16 experts on a CPU are not packed again, though their kernel multiplies by packed ones: their
  kernel is made anew, as at the start;
* a tied head on a CPU keeps a kernel of its own, made of the old embedding: it is made anew;
* biases of FP8 linears on a CPU come back in BF16, which that kernel fails on: they become fp32.

That a kernel was made anew is checked too: those of oneDNN cannot be read back in full.

A load that breaks leaves meta tensors and collecting loaders behind. They are cleared away, so that
the next load works; until then the weights are a mixture and nothing may be served.

Left out: weights that are quantized by the engine (BF16 sent, FP8 held).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.engine_private import cpu_kernel, fp8_kernel, moe_backend, repair
from fp8rl.sync.engine_units import Unit, units_of
from fp8rl.sync.errors import ManifestError, ReadBackError

CPU_FP8_LINEAR = ("CPUFp8BlockScaledMMKernel", "Avx512Fp8Kernel")  # the same operator


def load(model: Any, model_config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load whole units of the model; every other module keeps what it holds, bit for bit.

    Args:
        model: the live model of this worker, an ``nn.Module`` of vLLM.
        model_config: its config, as the worker has it.
        tensors: whole (unsharded) tensors by Hugging Face name. vLLM keeps references to them until
            this returns: their memory must not change meanwhile.

    Raises:
        ManifestError: an unknown name, a unit given in part, a wrong dtype or shape; nothing was
            touched.
        ReadBackError: a kernel was not made anew.
        Exception: whatever a loader of vLLM raises. The model is then a mixture of old and new
            weights, and ready for the next load.
    """
    chosen = units_of(model, tensors)
    _refuse_misfits(chosen, tensors)
    kernels = {unit.module: unit.module.quant_method.moe_kernel for unit in chosen if _packs(unit)}
    before = {m: cpu_kernel(m) for unit in chosen for m in (unit.module, *unit.tied)}
    try:
        for unit in chosen:
            initialize_layerwise_reload(unit.module)
        for module in kernels:
            module.quant_method.moe_kernel = None  # what vLLM takes for the first load
        model.load_weights(iter(tensors.items()))
        for unit in chosen:
            finalize_layerwise_reload(unit.module, model_config)
            for head in unit.tied:
                head.quant_method.process_weights_after_loading(head)
        fit_biases(model)
        _refuse_old_kernels(chosen, before)
    except BaseException:
        abandon_reload(model)
        for module, kernel in kernels.items():
            if module.quant_method.moe_kernel is None:
                module.quant_method.moe_kernel = kernel
        raise


def abandon_reload(model: nn.Module) -> None:
    """Put kernel tensors and loaders back where a load broke halfway, so that the next can begin.

    The weights are then a mixture of versions: nothing may be served before the next good update.
    """
    for module in model.modules():
        repair(module)


def fit_biases(model: nn.Module) -> None:
    """Give the biases of FP8 linears on a CPU the dtype that their kernel takes: fp32.

    vLLM 0.32 converts biases for its BF16 kernels but not for this one, which then fails in the
    first forward ("expected scalar type Float but found BFloat16"). To call after every load.
    """
    for module in model.modules():
        if not isinstance(module, LinearBase) or module.bias is None:
            continue
        if module.weight.dtype == FP8_DTYPE and fp8_kernel(module) in CPU_FP8_LINEAR:
            module.bias.data = module.bias.data.float()


def _packs(unit: Unit) -> bool:
    """Whether it is BF16 experts on a CPU, which vLLM packs when it makes their kernel only."""
    if not isinstance(unit.module, RoutedExperts):
        return False
    unquantized = isinstance(unit.module.quant_method, UnquantizedFusedMoEMethod)
    return unquantized and moe_backend(unit.module) == "CPU"


def _refuse_old_kernels(chosen: Iterable[Unit], before: Mapping[Any, Any]) -> None:
    for unit in chosen:
        for module in (unit.module, *unit.tied):
            if before[module] is not None and cpu_kernel(module) is before[module]:
                raise ReadBackError(
                    f"{unit.prefix}: new weights were loaded, but the kernel of a "
                    f"{type(module).__name__} was not made anew and multiplies by the old ones"
                )


def _refuse_misfits(chosen: Iterable[Unit], tensors: Mapping[str, torch.Tensor]) -> None:
    for unit in chosen:
        for place in unit.places:
            found = tensors[place.name]
            if found.dtype != place.dtype or tuple(found.shape) != place.shape:
                raise ManifestError(
                    f"{place.name}: the engine takes {place.dtype} {list(place.shape)}, found "
                    f"{found.dtype} {list(found.shape)}"
                )
