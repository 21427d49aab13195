"""The residual stream of the live engine, from hooks on its decoder layers, inside its worker.

A layer of vLLM returns what its MLP gave and the stream before it, which the next layer's fused
norm adds in place; the sum is taken here before that happens. What the first layer is given is the
embedding. The layers are those that hold an attention layer.

A model that runs compiled or as CUDA graphs calls no hooks and is refused, as for q, k and v. Left
out: pipeline-parallel engines, and layers that return anything but (output, stream) or the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from fp8rl.sync.engine_rows import Rows, rows_of
from fp8rl.sync.errors import StreamError
from fp8rl.sync.qkv_engine import compiled

_ARGUMENTS: Final = ("positions", "hidden_states", "residual")  # of a layer, in vLLM's order


class EngineStreams:
    """The decoder layers of a worker's vLLM model.

    Raises:
        StreamError: the engine runs compiled or as CUDA graphs, or its model has no such layers,
            or not all of them.
    """

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        if how := compiled(config):
            raise StreamError(
                f"the engine runs with {how}, which show nothing of its layers; start it with "
                "enforce_eager=True"
            )
        self._model, self._layers = model, _decoder_layers(model)
        expected = config.model_config.get_total_num_hidden_layers()
        if sorted(self._layers) != list(range(expected)):
            raise StreamError(
                f"{type(model).__name__} shows layers {sorted(self._layers)} here, expected all of "
                f"0..{expected - 1}; pipeline-parallel engines show none"
            )

    @contextmanager
    def watch(self) -> Iterator[StreamsSeen]:
        """Write down the stream of every forward inside the block."""
        seen = StreamsSeen(len(self._layers) + 1)
        with ExitStack() as stack:
            hook = self._model.register_forward_pre_hook(seen.begin, with_kwargs=True)
            stack.callback(hook.remove)
            hook = self._layers[0].register_forward_pre_hook(seen.enter, with_kwargs=True)
            stack.callback(hook.remove)
            for number, layer in self._layers.items():
                hook = layer.register_forward_hook(partial(seen.leave, number + 1))
                stack.callback(hook.remove)
            yield seen


class StreamsSeen:
    """The stream of each sequence that went through the model."""

    def __init__(self, points: int) -> None:
        self._points = points
        self._here: list[Rows] = []  # sequences of the forward that runs
        self._found: dict[tuple[int, ...], dict[int, Tensor]] = {}

    def begin(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model's pre-hook: a forward begins; find its sequences."""
        self._here = rows_of(args, kwargs)

    def enter(self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The first layer's pre-hook: it is given the embedding."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        self._keep(0, given["hidden_states"])

    def leave(self, point: int, layer: nn.Module, args: object, output: Any) -> None:
        """A layer's hook: what it adds to the stream, and the stream."""
        added, stream = output if isinstance(output, tuple) else (output, None)
        self._keep(point, added if stream is None else added + stream)

    def of(self, sequences: Sequence[Sequence[int]]) -> BFloat16[Tensor, "tokens points hidden"]:
        """The stream of each token of these sequences but the last of each, one after the other.

        Raises:
            StreamError: no forward computed one of them whole.
        """
        found = []
        for sequence in sequences:
            points = self._found.get(tuple(sequence), {})
            if len(points) < self._points:
                raise StreamError(
                    f"a sequence of {len(sequence)} tokens was not computed in one piece; observe "
                    "fewer tokens at once"
                )
            found.append(torch.stack([points[n][:-1] for n in range(self._points)], dim=1))
        return torch.cat(found).bfloat16()

    def _keep(self, point: int, stream: Tensor) -> None:
        for rows, tokens in self._here:
            kept = stream[rows].to("cpu", copy=True)  # the next norm writes where it stands
            self._found.setdefault(tokens, {})[point] = kept


def _decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """By number: the module under a number in whose name an attention layer stands."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            number = extract_layer_index(module.layer_name)
            match = re.match(rf"(.*\.{number})\.", name)
            if match is not None:
                found[number] = model.get_submodule(match[1])
    return found
