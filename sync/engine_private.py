"""The private names of vLLM by which a live engine is loaded, repaired and read back.

vLLM has public calls for loading weights into a live model, none for mending a load that broke and
none for reading what its kernels hold. Every name without a promise that is used for that stands
here, with the reason, and is checked when this file is imported: on another vLLM nothing is loaded
by guesswork.

    _place_kernel_tensors, _get_original_loader    undo ``initialize_layerwise_reload``
    layer.cpu_linear                               the function that a BF16 linear on a CPU calls
    packed_weight, its free variable               the weight by which it multiplies, if SGL packed
    quant_method.fp8_linear                        the kernel of an FP8 linear, known by its class
    quant_method.moe_kernel.fused_experts          the kernel of a MoE layer; its scales
    quant_method.fp8_backend, unquantized_backend  which of them it is
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)

from fp8rl.sync.errors import ReadBackError

SUPPORTED_VLLM = "0.32."
_SET_BY = {  # attribute -> a function of vLLM that sets it
    "cpu_linear": dispatch_cpu_unquantized_gemm,
    "packed_weight": dispatch_cpu_unquantized_gemm,
    "fp8_linear": Fp8LinearMethod.create_weights,
    "fp8_backend": Fp8MoEMethod.__init__,
    "unquantized_backend": UnquantizedFusedMoEMethod.__init__,
    "moe_kernel": FusedMoEMethodBase.__init__,
}


def _check() -> None:
    """Refuse to be imported on a vLLM whose insides nobody has compared with this file."""
    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise ImportError(
            f"vllm {vllm.__version__} found, but fp8rl.sync.engine_private reads private names of "
            f"vllm {SUPPORTED_VLLM}x; install that version or a newer fp8rl"
        )
    for name, function in _SET_BY.items():
        if name not in function.__code__.co_names + function.__code__.co_cellvars:
            raise ImportError(
                f"vllm {vllm.__version__} has no {name!r} in {function.__qualname__}, by which "
                "fp8rl reads back weights; install a vllm that fp8rl was tested with"
            )


_check()


def repair(module: nn.Module) -> None:
    """Undo ``initialize_layerwise_reload`` on one module where its load did not end.

    Its kernel tensors are put back as they are, and no loader stays wrapped: a wrapped one swallows
    whatever is loaded later without a word.
    """
    info = get_layerwise_info(module)
    if not info.can_load():
        return
    if info.kernel_tensors is not None:
        _place_kernel_tensors(module, info)
        recorded, live = info.restore_metadata, (module._parameters, module._buffers)
        for tensors in (*recorded, *live):
            for tensor in tensors.values():
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = _get_original_loader(tensor)
    info.reset()


def cpu_kernel(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """The function ``(x, weight, bias) -> y`` of a BF16 linear or head on a CPU, else None."""
    kernel: Callable[..., torch.Tensor] | None = getattr(module, "cpu_linear", None)
    return kernel


def packed_weight(kernel: Callable[..., torch.Tensor]) -> torch.Tensor | None:
    """The weight inside a CPU kernel, as ``convert_weight_packed`` packs it.

    None where it is not to be seen, as in oneDNN's.
    """
    names, cells = kernel.__code__.co_freevars, kernel.__closure__ or ()
    found = dict(zip(names, cells, strict=True)).get("packed_weight")
    return None if found is None else found.cell_contents


def fp8_kernel(module: Any) -> str:
    """The class of an FP8 linear's kernel."""
    return type(module.quant_method.fp8_linear).__name__


def method(module: Any) -> str:
    """The class of the method by which a linear or experts are computed."""
    return type(module.quant_method).__name__


def moe_backend(module: Any) -> str:
    """The kernel family of a MoE layer, as vLLM names it."""
    method = module.quant_method
    backend = method.fp8_backend if isinstance(method, Fp8MoEMethod) else method.unquantized_backend
    return str(backend.name)


def moe_experts(module: Any) -> Any:
    """The experts' kernel of a MoE layer; for FP8 its ``w1_scale`` and ``w2_scale`` count."""
    kernel = module.quant_method.moe_kernel
    if kernel is None:
        raise ReadBackError("a MoE layer has no kernel: no weights were loaded into it")
    return kernel.fused_experts
