"""The rollout engine's process with a request that damages its live model.

Usage: as ``fp8rl.engine.process``, for which it stands in ``RolloutEngine(..., module=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fp8rl.engine.process import main
from fp8rl.engine.server import EngineServer


class Damaged(EngineServer):
    def damage(self, what: str, layer: int) -> None:
        """One of DAMAGES, done to the layer of this number."""
        self._llm.apply_model(partial(_damage, DAMAGES[what], layer))


def _damage(do: Callable[[Any], None], layer: int, model: Any) -> None:
    do(model.model.layers[layer])


def weight(layer: Any) -> None:
    """A part of the held bytes of one FP8 weight, as the kernel has packed them, become 0."""
    held = layer.self_attn.o_proj.weight.data.view(torch.uint8).flatten()
    held[: len(held) // 4] = 0


def key(layer: Any) -> None:
    """The kernel that writes the cache takes another scale for k than everybody believes."""
    attention = layer.self_attn.attn.impl
    write = attention.do_kv_cache_update
    attention.do_kv_cache_update = lambda module, k, *rest: write(module, k * 4, *rest)


def key_mended(layer: Any) -> None:
    """Undo ``key``."""
    del layer.self_attn.attn.impl.do_kv_cache_update


def scale(layer: Any) -> None:
    """The engine's own copy of the scale of k is another than was published."""
    layer.self_attn.attn._k_scale_float *= 4


def scale_mended(layer: Any) -> None:
    """Undo ``scale``."""
    layer.self_attn.attn._k_scale_float /= 4


def router(layer: Any) -> None:
    """Each token goes to the neighbours of the experts that its router was to choose."""
    gate = layer.mlp.gate
    gate.turned = gate.register_forward_hook(
        lambda module, args, output: (output[0].roll(1, -1), *output[1:])
    )


def router_mended(layer: Any) -> None:
    """Undo ``router``."""
    layer.mlp.gate.turned.remove()


DAMAGES = {
    do.__name__: do for do in (weight, key, key_mended, scale, scale_mended, router, router_mended)
}

if __name__ == "__main__":
    main(Damaged)
