"""What Megatron-core needs to run where CUDA is absent, each thing with its reason.

Megatron-core 0.16 trains on a CPU with Gloo, but names the CUDA device in a few places. These are
answered here, for the length of a ``with`` block and nowhere else; nothing of Megatron is replaced:

* ``torch.cuda.current_device()`` is where it allocates buffers, and raises without CUDA. Inside
  the block it answers ``torch.device("cpu")``.
* ``device="cuda"`` is written out in its schedules (token counts) and in its gradient norm. Inside
  the block torch functions read it as "cpu".
* Its MoE router asks whether Transformer Engine's GEMM is there by a name that it forgot to set
  where that is not installed. Inside the block the name is there, and None.
* Its RNG tracker forks CUDA generators around dropout. Its own inference tracker forks nothing,
  which is right here: this policy has no dropout.
* ``use_cpu_initialization``, all fusions off and the ``allgather`` token dispatcher (the other one
  needs CUDA streams) are settings of the model (``megatron_model.py``).
* Its norms are Transformer Engine's or Apex's wherever sequence parallelism is on. ``TorchRMSNorm``
  is torch's own, marked as Megatron marks those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


EXPERT_ROWS = 64  # more waste time on zeros, fewer make more kernels


class _CudaMeansCpu(TorchFunctionMode):
    """Reads ``device="cuda"`` as "cpu" in every torch function called inside."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def cpu_stands_in() -> Iterator[None]:
    """Let Megatron code inside the block find the CPU where it asks for CUDA."""
    from megatron.core.transformer.moe import moe_utils

    with (
        _CudaMeansCpu(),
        _answering(torch.cuda, "current_device", lambda: torch.device("cpu")),
        _answering(moe_utils, "te_general_gemm", None),
    ):
        yield


@contextmanager
def _answering(module: ModuleType, name: str, answer: object) -> Iterator[None]:
    """Set a module's attribute inside the block, whether it had one or not."""
    before = {name: getattr(module, name)} if hasattr(module, name) else {}
    setattr(module, name, answer)
    try:
        yield
    finally:
        delattr(module, name)
        vars(module).update(before)


class TorchRMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the signature of Megatron's norms.

    Where each rank has a part of the sequence its gradient is one, which Megatron adds up over the
    tensor-parallel ranks for parameters that are marked so.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **_: object
    ) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def pad_experts(model: nn.Module) -> None:
    """Have each expert of a model compute on a multiple of ``EXPERT_ROWS`` tokens, filled with 0.

    Each batch gives an expert another number of tokens, and for each shape that it has not met
    oneDNN makes a kernel anew, which takes three times as long as the multiplication.
    """
    from megatron.core.transformer.moe.experts import SequentialMLP

    for module in model.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                expert.forward = partial(_on_whole_rows, expert.forward)


def _on_whole_rows(
    forward: Callable[..., Any], tokens: Tensor, weights: Tensor
) -> tuple[Tensor, None]:
    """An expert's forward: tokens [n, hidden] and the routers' weights [n]; there is no bias."""
    count = len(tokens)
    filling = -count % EXPERT_ROWS
    output, _ = forward(pad(tokens, (0, 0, 0, filling)), pad(weights, (0, filling)))
    return output[:count], None


def use_still_rng_tracker() -> None:
    """Install Megatron's inference RNG tracker, whose forks do nothing."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
