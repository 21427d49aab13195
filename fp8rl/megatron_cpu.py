"""What Megatron-core needs to run where CUDA is absent, each thing with its reason.

Megatron-core 0.16 trains on a CPU with Gloo, but names the CUDA device in a few places. These are
answered here, for the length of a ``with`` block and nowhere else; nothing of Megatron is replaced:

* ``torch.cuda.current_device()`` is where it allocates buffers, and raises without CUDA. Inside
  the block it answers ``torch.device("cpu")``.
* ``device="cuda"`` is written out in its schedules (token counts) and in its gradient norm. Inside
  the block torch functions read it as "cpu".
* Its RNG tracker forks CUDA generators around dropout. Its own inference tracker forks nothing,
  which is right here: this policy has no dropout.
* ``use_cpu_initialization`` and all fusions off are settings of the model (``megatron_model.py``).

Left out: MoE, which needs ``moe_utils.te_general_gemm = None`` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
    asked = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    try:
        with _CudaMeansCpu():
            yield
    finally:
        torch.cuda.current_device = asked


def use_still_rng_tracker() -> None:
    """Install Megatron's inference RNG tracker, whose forks do nothing."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
