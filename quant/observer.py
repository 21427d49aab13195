"""The running largest magnitude of q, k and v in each layer, for KV-cache calibration.

    amax[layer, x] = max over real tokens, heads and channels of |x|,   x in (q, k, v)

q and k are to be observed after QK-norm and RoPE, as they enter the cache. Padding is left out by a
mask and never read. Left out: percentiles and averages over steps; the reduction over ranks, which
the caller does on the tensor of `partial_amax`.
"""

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from fp8rl.quant.errors import KVScaleError
from fp8rl.quant.kv_scales import QKV

UNSEEN = -1.0  # below every amax, so that a max over ranks keeps what any of them saw


class AmaxObserver:
    """Element-level amax of q, k and v, for `num_layers` layers; one for each weight version."""

    name = "amax"

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise KVScaleError(f"num_layers must be at least 1, found {num_layers}")
        self._amax = torch.full((num_layers, len(QKV)), UNSEEN, dtype=torch.float32)
        self._tokens = [0] * num_layers

    @property
    def tokens(self) -> int:
        """Real tokens that every observed layer has seen (the least of them; 0 before any)."""
        return min((count for count in self._tokens if count), default=0)

    def observe(
        self,
        layer: int,
        q: Float[Tensor, "*tokens q_heads d"],
        k: Float[Tensor, "*tokens kv_heads d"],
        v: Float[Tensor, "*tokens kv_heads dv"],
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> None:
        """Take in q [.., Hq, D], k and v [.., Hkv, D] of one layer; leading dimensions are tokens.

        `layer` is the global layer number. `mask` [..] is True at real tokens; what stands at the
        others, NaN too, changes nothing. A call without real tokens is no observation.

        Raises KVScaleError for an unknown layer, shapes that do not fit, and non-finite values at
        real tokens.
        """
        if not 0 <= layer < len(self._tokens):
            raise KVScaleError(f"layer must be in 0..{len(self._tokens) - 1}, found {layer}")
        lead = q.shape[:-2]
        shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
        if any(x.ndim < 3 or x.shape[:-2] != lead for x in (q, k, v)):
            raise KVScaleError(
                f"layer {layer}: q, k and v must be [tokens.., heads, channels] of the same "
                f"tokens, found {shapes}"
            )
        if mask is not None and (mask.shape != lead or mask.dtype != torch.bool):
            raise KVScaleError(
                f"layer {layer}: mask must be bool {tuple(lead)}, "
                f"found {mask.dtype} {tuple(mask.shape)}"
            )
        count = int(mask.sum()) if mask is not None else lead.numel()
        if count == 0:
            return
        found = torch.stack([_amax(x.detach(), mask) for x in (q, k, v)]).cpu()
        if not bool(torch.isfinite(found).all()):
            raise KVScaleError(
                f"layer {layer}: observed amax of (q, k, v) is {found.tolist()}, which must be "
                "finite; look for NaN or Inf in the layer's input or weights"
            )
        self._amax[layer] = torch.maximum(self._amax[layer], found)
        self._tokens[layer] += count

    def partial_amax(self) -> Float32[Tensor, "layers 3"]:
        """Return a copy of the state [L, 3], with -1 for layers not seen here.

        An elementwise max over ranks of this tensor is the state of one observer that saw it all.
        """
        return self._amax.clone()

    def amax(self) -> Float32[Tensor, "layers 3"]:
        """Return amax [L, 3] of q, k, v. Raises KVScaleError naming the layers never seen."""
        unseen = [layer for layer, count in enumerate(self._tokens) if count == 0]
        if unseen:
            raise KVScaleError(
                f"layers {unseen} of {len(self._tokens)} were never observed; run a forward "
                "through all of them, or join the partial_amax of the ranks that hold them"
            )
        return self._amax.clone()


def _amax(x: Tensor, mask: Tensor | None) -> Tensor:
    magnitude = x.abs()
    if mask is not None:
        magnitude = magnitude.masked_fill(~mask[..., None, None], 0.0)
    return magnitude.amax().float()
