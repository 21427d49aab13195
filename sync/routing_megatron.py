"""Which experts the routers of a megatron-core GPTModel choose, token by token.

A router returns for each of its tokens the weight of every expert, 0 where it is not chosen; the k
largest, in order, are the choice. Its tokens are those of a micro-batch [time, batch], or this
tensor-parallel rank's part of the time under sequence parallelism, in order of ranks.

Left out: experts chosen by groups, and routers that drop tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor, nn

from fp8rl.sync.errors import RoutingError
from fp8rl.sync.megatron_layout import model_chunks


class MegatronRouters:
    """The routers of a trainer rank's GPTModel, or its chunks.

    Raises:
        RoutingError: a layer has no experts.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._chunks = model_chunks(model)
        self._routers: dict[int, Any] = {}
        for layer in (layer for chunk in self._chunks for layer in chunk.decoder.layers):
            router = getattr(layer.mlp, "router", None)
            if router is None:
                raise RoutingError(f"layer {layer.layer_number - 1} has no experts")
            self._routers[layer.layer_number - 1] = router

    @contextmanager
    def watch(self) -> Iterator[MegatronRoutes]:
        """Write down what every forward inside the block chooses."""
        routes = MegatronRoutes(self._chunks[0].config)
        with ExitStack() as stack:
            for layer, router in self._routers.items():
                hook = router.register_forward_hook(partial(routes.choose, layer))
                stack.callback(hook.remove)
            yield routes


class MegatronRoutes:
    """What this rank's routers chose, micro-batch by micro-batch."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._chosen: dict[int, list[Tensor]] = {}

    def choose(self, layer: int, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The router's hook: its input [time, batch, hidden], the weights [tokens, experts]."""
        weights, _ = output
        chosen = weights.detach().topk(self._config.moe_router_topk, dim=-1).indices
        time, batch = args[0].shape[:2]
        self._chosen.setdefault(layer, []).append(chosen.view(time, batch, -1).transpose(0, 1))

    def gathered(
        self, tensor_parallel: dist.ProcessGroup, model_parallel: dist.ProcessGroup
    ) -> Int64[Tensor, "batch time layers k"]:
        """Join micro-batches, layers and parts of the time: a collective, the same on all ranks.

        Of a token the first choice comes first. tensor_parallel: ranks that share each layer.
        model_parallel: these and all pipeline stages.
        """
        layers = {layer: torch.cat(parts) for layer, parts in self._chosen.items()}
        batch, time, k = next(iter(layers.values())).shape
        ranks = tensor_parallel.size() if self._config.sequence_parallel else 1
        first = time * tensor_parallel.rank() if ranks > 1 else 0
        whole = torch.zeros(batch, time * ranks, self._config.num_layers, k, dtype=torch.int64)
        for layer, chosen in layers.items():
            whole[:, first : first + time, layer] = chosen
        if model_parallel.size() > 1:
            dist.all_reduce(whole, dist.ReduceOp.MAX, group=model_parallel)  # 0 elsewhere
        return whole
