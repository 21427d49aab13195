"""An FP8 KV cache that rounds to the nearest number on a CPU, as GPUs do.

vLLM's CPU kernel cuts E4M3 off instead (0.32: 4.9 % of a key lost where rounding loses 2.7 %, and
always towards zero, so that attention is flatter than it should be). Where an engine is to compute
like a GPU (``engine_w8a8.py``), keys and values are rounded before the kernel is given them:

    c = nearest E4M3 of x / scale          x' = c scale (1 + 2^-7)

Codes of E4M3 are 2^-4 of their value or more apart, and BF16 moves x' by 2^-9 of it at most, so
that what is cut off of x' / scale is the nudge, for any scale: the cache holds c. Attention on a
CPU reads keys and values from the cache alone, so no one else meets the nudge; whoever watches keys
and values sees them before (``shown`` in ``qkv_source.py``).

A pre-hook on the attention layer, which a model that runs compiled calls too, since it is there
before vLLM compiles. Left out: per-head scales, which vLLM does not load on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import BFloat16
from torch import Tensor
from vllm.model_executor.layers.quantization.fp8 import Fp8KVCacheMethod

from fp8rl.quant.scales import E4M3_MAX
from fp8rl.quant.tensor import FP8_DTYPE

NUDGE = 1 + 2.0**-7
_NAMES = ("query", "key", "value")


class NearestKVCache(Fp8KVCacheMethod):
    """vLLM's KV scales in an attention layer, whose keys and values are then rounded by them."""

    def create_weights(self, layer: Any) -> None:
        """Make the scales; where the cache is FP8, round what the layer is given."""
        super().create_weights(layer)
        if layer.kv_cache_dtype.startswith("fp8"):
            layer.register_forward_pre_hook(_rounded, with_kwargs=True)


def to_nearest(x: BFloat16[Tensor, "*shape"], scale: float) -> BFloat16[Tensor, "*shape"]:
    """Keys or values of which a kernel that cuts off keeps the nearest E4M3 times ``scale``."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(FP8_DTYPE)
    return (codes.float() * (scale * NUDGE)).to(x.dtype)


def _rounded(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    query, key, value = (given.pop(name) for name in _NAMES)
    if key is not None:  # else a layer with another's cache
        key = to_nearest(key, layer._k_scale_float)
        value = to_nearest(value, layer._v_scale_float)
    return (query, key, value, *args[len(_NAMES) :]), given
