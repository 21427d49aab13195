"""Which experts the routers of the live engine choose, token by token, inside its worker.

vLLM's routers take a callback for the experts they have chosen (``set_capture_fn``: what its own
``enable_return_routed_experts`` hangs on, which needs its second model runner, and that needs
Triton: not to be had on a CPU). They come in no order; the gate's logits, seen by a hook, say which
is the first choice. Which token a row is, the model's own inputs say (``engine_rows.py``).

A sequence that was cut or had a prefix in the cache is refused, for its first rows would be
missing. A model that runs compiled or as CUDA graphs calls no hooks and is refused too (as for q, k
and v). Left out: routers inside monolithic kernels, and tokens that are spread over workers
(sequence-parallel experts, data parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from fp8rl.sync.engine_rows import Rows, rows_of
from fp8rl.sync.errors import RoutingError
from fp8rl.sync.qkv_engine import compiled


class EngineRouters:
    """The routers of a worker's vLLM model.

    Raises:
        RoutingError: the engine runs compiled or as CUDA graphs, or the model has no experts, or
            routers of a kind that shows nothing.
    """

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        if how := compiled(config):
            raise RoutingError(
                f"the engine runs with {how}, which show nothing of its routers; start it with "
                "enforce_eager=True"
            )
        self._model = model
        self._runners = {m.layer_id: m for m in model.modules() if isinstance(m, MoERunner)}
        if not self._runners:
            raise RoutingError(f"{type(model).__name__} has no layer with experts")
        for runner in self._runners.values():
            plain = isinstance(runner.router, BaseRouter) and runner.gate is not None
            if not plain or runner.is_monolithic:
                raise RoutingError(
                    f"{runner.layer_name}: {type(runner.router).__name__} in "
                    f"{type(runner.routed_experts.quant_method).__name__} does not show which "
                    "experts it chooses"
                )

    @contextmanager
    def watch(self) -> Iterator[EngineRoutes]:
        """Write down what every forward inside the block chooses."""
        routes = EngineRoutes()
        with ExitStack() as stack:
            hook = self._model.register_forward_pre_hook(routes.begin, with_kwargs=True)
            stack.callback(hook.remove)
            for layer, runner in self._runners.items():
                hook = runner.gate.register_forward_hook(partial(routes.score, layer))
                stack.callback(hook.remove)
                stack.callback(runner.router.set_capture_fn, runner.router.capture_fn)
                runner.router.set_capture_fn(partial(routes.choose, layer))
            yield routes


class EngineRoutes:
    """What the routers chose of each sequence that went through the model."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self._here: list[Rows] = []  # sequences of the forward that runs
        self._logits: dict[int, Tensor] = {}

    def begin(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model's pre-hook: a forward begins; find its sequences."""
        self._here = rows_of(args, kwargs)

    def score(self, layer: int, gate: nn.Module, args: object, output: Any) -> None:
        """The gate's hook: the logits of all experts, for the order of those chosen."""
        self._logits[layer] = output[0] if isinstance(output, tuple) else output

    def choose(self, layer: int, experts: Tensor) -> None:
        """The router's callback: the experts [rows, k] that tokens go to."""
        chosen = experts.long()
        logits = self._logits.pop(layer).gather(1, chosen)
        order = logits.argsort(dim=1, descending=True, stable=True)
        in_order = chosen.gather(1, order).cpu()
        for rows, tokens in self._here:
            self._found.setdefault(tokens, {})[layer] = in_order[rows]

    def of(self, sequence: Sequence[int]) -> Int64[Tensor, "time layers k"]:
        """The experts of each token of a sequence, first choice first, in order of layers.

        Raises:
            RoutingError: no forward computed that sequence whole.
        """
        found = self._found.get(tuple(sequence))
        if found is None:
            raise RoutingError(
                f"a sequence of {len(sequence)} tokens was not computed in one piece; observe "
                "fewer tokens at once"
            )
        return torch.stack([found[layer] for layer in sorted(found)], dim=1)
