"""The residual stream of a megatron-core GPTModel: watched, put in place, its KV cache imagined.

    watch()           what stands after each layer, of every forward inside the block
    watch(given)      the same, but each layer is given another stream: the live engine's. So its
                      output is what this layer would add in the engine's place, whatever the layers
                      before it do, and a fault shows in the layer that has it and in no other
    rounded_cache(s)  k and v reach attention as an FP8 cache with these scales gives them back:
                          k~ = s * e4m3(clamp(k / s, -448, 448))
                      e4m3 rounds to the nearest number on CUDA. vLLM 0.32 on a CPU cuts off what
                      does not fit, towards zero: observed at every BF16 number. Its error is 1.8
                      times as large, and has one sign

Left out: interleaved pipelines, context parallelism, packed sequences; an FP8 q, which some CUDA
kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from jaxtyping import Float, Float32
from torch import Tensor, nn

from fp8rl.quant import E4M3_MAX, KVScales
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.megatron_layout import model_chunks

_ARGUMENTS: Final = ("query", "key", "value")  # of core attention, in Megatron's order


class MegatronStreams:
    """The layers of a trainer rank's GPTModel."""

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        chunks = model_chunks(model)
        self._config = chunks[0].config
        self._layers = {
            layer.layer_number - 1: layer for chunk in chunks for layer in chunk.decoder.layers
        }

    @contextmanager
    def watch(
        self, given: Float[Tensor, "batch time points hidden"] | None = None
    ) -> Iterator[MegatronStreamsSeen]:
        """Write down what every layer gives; with ``given`` the layers take that instead.

        given: of the rows and times of the forwards to come, in order of micro-batches; point 0 is
        the embedding, point l + 1 stands after layer l. Missing rows and times are zeros.
        """
        seen = MegatronStreamsSeen(self._config, given)
        with ExitStack() as stack:
            for number, layer in self._layers.items():
                if number == 0:
                    hook = layer.register_forward_pre_hook(seen.enter, with_kwargs=True)
                    stack.callback(hook.remove)
                hook = layer.register_forward_hook(partial(seen.leave, number + 1))
                stack.callback(hook.remove)
            yield seen

    @contextmanager
    def rounded_cache(self, scales: KVScales, *, truncates: bool) -> Iterator[None]:
        """Round k and v in every forward inside the block as their cache does."""
        with ExitStack() as stack:
            for number, layer in self._layers.items():
                of_layer = scales.layers[number]
                hook = partial(_round, of_layer.k.scale, of_layer.v.scale, truncates)
                attention = layer.self_attention.core_attention
                handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield


class MegatronStreamsSeen:
    """What this rank's layers gave, micro-batch by micro-batch."""

    def __init__(self, config: Any, given: Tensor | None) -> None:
        self._config, self._given = config, given
        self._seen: dict[int, list[Tensor]] = {}  # point -> [time, batch, hidden] of micro-batches

    def enter(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The first layer's pre-hook: it is given the embedding."""
        stream = self._pass(0, layer, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": stream}

    def leave(self, point: int, layer: Any, args: tuple[Any, ...], output: Any) -> Any:
        """A layer's hook: the stream behind it."""
        stream, context = output
        return self._pass(point, layer, stream), context

    def gathered(
        self, tensor_parallel: dist.ProcessGroup, model_parallel: dist.ProcessGroup
    ) -> Float32[Tensor, "batch time points hidden"]:
        """Join micro-batches, layers and parts of the time: a collective, the same on all ranks.

        tensor_parallel: ranks that share each layer. model_parallel: these and all stages.
        """
        points = {point: torch.cat(parts, 1) for point, parts in self._seen.items()}
        time, batch, hidden = next(iter(points.values())).shape
        parted = self._config.sequence_parallel and tensor_parallel.size() > 1
        ranks, first = (tensor_parallel.size(), time * tensor_parallel.rank()) if parted else (1, 0)
        whole = torch.zeros(batch, time * ranks, self._config.num_layers + 1, hidden)
        if parted or tensor_parallel.rank() == 0:  # the others have the same
            for point, stream in points.items():
                whole[:, first : first + time, point] = stream.transpose(0, 1)
        if model_parallel.size() > 1:
            dist.all_reduce(whole, group=model_parallel)  # 0 elsewhere
        return whole

    def _pass(self, point: int, layer: Any, stream: Tensor) -> Tensor:
        """Keep a stream; return it, or what is given in its place."""
        before = self._seen.setdefault(point, [])
        row = sum(part.shape[1] for part in before)
        before.append(stream.detach().clone())
        if self._given is None:
            return stream
        time, batch = stream.shape[:2]
        group = layer.self_attention.pg_collection.tp
        first = time * group.rank() if self._config.sequence_parallel else 0
        given = self._given[row : row + batch, first : first + time, point].transpose(0, 1)
        result = torch.zeros_like(stream)
        result[: given.shape[0], : given.shape[1]] = given
        return result


def _round(
    k_scale: float,
    v_scale: float,
    truncates: bool,
    attention: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The pre-hook of core attention: q stays, k and v go through the cache."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    k = through_cache(given["key"], k_scale, truncates=truncates)
    v = through_cache(given["value"], v_scale, truncates=truncates)
    return (given["query"], k, v, *args[3:]), {
        name: value for name, value in kwargs.items() if name not in _ARGUMENTS
    }


def through_cache(
    x: Float[Tensor, "*shape"], scale: float, *, truncates: bool
) -> Float[Tensor, "*shape"]:
    """What an FP8 cache with this scale gives back of keys or values; of their shape and dtype."""
    scaled = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    held = scaled.to(FP8_DTYPE)
    if truncates:  # a step towards zero, of the magnitude's code, where it was rounded away from it
        away = held.float().abs() > scaled.abs()
        held = (held.view(torch.uint8) - away.byte()).view(FP8_DTYPE)
    return (held.float() * scale).to(x.dtype)
