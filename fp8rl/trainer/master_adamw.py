"""AdamW on fp32 master weights, behind the BF16 parameters of a Megatron DDP model.

    g <- g min(1, clip / |g|)         m, v <- Adam's moments of g        (Loshchilov & Hutter 2019)
    master <- (1 - lr wd) master - lr m^ / (sqrt(v^) + eps)              parameter <- bf16(master)

Gradients are Megatron's own fp32 ``main_grad``; the norm is Megatron's, over all tensor- and
pipeline-parallel ranks, each parameter counted once. Weight decay spares one-dimensional
parameters, as Megatron's does. Megatron's own mixed-precision optimizer is not used: it takes only
``torch.cuda`` tensors, and agrees on its parameter groups by pickled objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp8rl.errors import NonFiniteGradientError

if TYPE_CHECKING:
    import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = (0.9, 0.95)  # those of most LLM training; a short memory suits short runs


class MasterAdamW:
    """One optimizer over named BF16 parameters; masters and moments are fp32, and this rank's.

    ``parameters``: name -> parameter with a ``main_grad`` (fp32). ``group``: the model-parallel
    process group, over which the gradient norm is summed.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float,
        grad_clip: float,
        group: dist.ProcessGroup,
    ) -> None:
        self._parameters = dict(parameters)
        self._masters = {n: p.detach().float().clone() for n, p in parameters.items()}
        self._learning_rate, self._grad_clip, self._group = learning_rate, grad_clip, group
        matrices = [m for m in self._masters.values() if m.ndim > 1]
        vectors = [m for m in self._masters.values() if m.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
        for master in self._masters.values():  # from the start, so that a state is always whole
            self._adam.state[master] = {"step": torch.zeros(())}
            for moment in MOMENTS:
                self._adam.state[master][moment] = torch.zeros_like(master)

    @torch.no_grad()
    def step(self, learning_rate: float | None = None, divided_by: float = 1.0) -> float:
        """Clip, step, write the parameters back; return the gradient norm before clipping.

        The gradient is what was accumulated divided by ``divided_by``.

        Raises:
            NonFiniteGradientError: the norm is not finite; nothing was changed.
        """
        norm = self._grad_norm() / divided_by
        if not math.isfinite(norm):
            raise NonFiniteGradientError(
                f"the gradient norm is {norm}; the step was not taken, the weights are unchanged. "
                "Look for NaN or Inf in the loss, the advantages and the log-probabilities"
            )
        scale = min(1.0, self._grad_clip / (norm + 1e-6)) / divided_by
        for name, master in self._masters.items():
            master.grad = self._parameters[name].main_grad  # type: ignore[attr-defined]
            if scale != 1.0:
                master.grad.mul_(scale)
        for group in self._adam.param_groups:
            group["lr"] = self._learning_rate if learning_rate is None else learning_rate
        self._adam.step()
        for name, master in self._masters.items():
            self._parameters[name].copy_(master)
            master.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """Copies of masters, moments and the step count, by name."""
        found = {"adam/step": self._any_state()["step"].reshape(1).clone()}
        for name, master in self._masters.items():
            found[f"master/{name}"] = master.clone()
            for moment in MOMENTS:
                found[f"adam/{moment}/{name}"] = self._adam.state[master][moment].clone()
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned; the keys must be there (the trainer checks)."""
        for name, master in self._masters.items():
            master.copy_(state[f"master/{name}"])
            self._adam.state[master]["step"].copy_(state["adam/step"].reshape(()))
            for moment in MOMENTS:
                self._adam.state[master][moment].copy_(state[f"adam/{moment}/{name}"])

    @torch.no_grad()
    def forget(self) -> None:
        """Set moments and step count to zero, as for an optimizer that was just made."""
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()

    def _any_state(self) -> dict[str, Tensor]:
        return next(iter(self._adam.state.values()))

    def _grad_norm(self) -> float:
        from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
        from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

        counted = [
            parameter.main_grad  # type: ignore[attr-defined]
            for parameter in self._parameters.values()
            if param_is_not_tensor_parallel_duplicate(parameter)
        ]
        return float(get_grad_norm_fp32(counted, grad_stats_parallel_group=self._group))
