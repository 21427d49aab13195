"""q, k and v of a megatron-core GPTModel, from pre-hooks on its core attention.

Core attention is the one place that every spec shares (local, Transformer Engine, one's own): it is
given q, k, v after QK-norm and RoPE, [time, batch, heads, d] or packed [tokens, heads, d].

    layer     layer_number - 1: Megatron numbers layers globally, from 1, in every stage and chunk
    heads     rank r of T: query heads from r * Hq/T, key/value heads from floor(r * Hkv / T)
              (with Hkv < T, Megatron replicates each over T/Hkv ranks)
    tokens    padded: token_mask; packed: what cu_seqlens_q says, and token_mask [1, tokens] if set

Packed token t of a context-parallel rank r of C, in a sequence padded to P tokens: the rank holds
the chunks r and 2C - 1 - r of 2C, so with c = P / 2C and the offset o in what the rank holds,

    position = o + r c            where o < c
               o + (2C - 2 - r) c elsewhere         real where position < the sequence's length

Left out: multi-latent attention (its cache is no k and v), CUDA graphs (they call no hooks),
multi-token-prediction layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from fp8rl.quant import AttentionShape, KVObserver, KVScaleError
from fp8rl.sync.megatron_layout import model_chunks
from fp8rl.sync.qkv_source import QKVWatch, check_forward, padding_mask, shown

_ARGUMENTS: Final = (  # of core attention, in Megatron's order
    *("query", "key", "value"),
    *("attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
)


class MegatronQKV:
    """A ``QKVSource`` over the GPTModel of a trainer rank, or its chunks (interleaved pipeline).

    ``token_mask`` is that of the rank's own tokens: under data parallelism its rows, under context
    parallelism its part of each row (as the model's ``position_ids`` are cut). A trainer that
    announces padding as real in ``cu_seqlens_q`` must set it for packed sequences too. Wrappers
    (DDP, Float16Module) may stay on.

    Raises:
        KVScaleError: the model has multi-latent attention, CUDA graphs, or a layer without core
            attention.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        unwrapped = model_chunks(model)
        config = unwrapped[0].config
        if config.multi_latent_attention:
            raise KVScaleError(
                "this model has multi-latent attention, whose cache holds latents and not k and v; "
                "serve it with a BF16 KV cache"
            )
        if config.cuda_graph_impl != "none":
            raise KVScaleError(
                f"cuda_graph_impl is {config.cuda_graph_impl!r}: a captured graph shows nothing of "
                "q, k and v; build the model with cuda_graph_impl='none', or measure in the engine"
            )
        self.shape = AttentionShape(
            config.num_layers, config.num_attention_heads, config.num_query_groups
        )
        self._layers = [layer for chunk in unwrapped for layer in chunk.decoder.layers]
        for layer in self._layers:
            if not hasattr(layer.self_attention, "core_attention"):
                raise KVScaleError(
                    f"layer {layer.layer_number - 1} has no core attention but "
                    f"{type(layer.self_attention).__name__}; every layer needs k and v"
                )

    @contextmanager
    def watch(self, observer: KVObserver) -> Iterator[QKVWatch]:
        """Feed ``observer`` with every forward inside the block; see ``QKVSource``."""
        watch = QKVWatch()
        with shown(
            (layer.self_attention.core_attention, partial(_see, observer, watch, layer))
            for layer in self._layers
        ):
            yield watch


def _see(
    observer: KVObserver,
    watch: QKVWatch,
    layer: Any,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """The pre-hook: show what core attention is given."""
    if watch.paused:
        return
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    q, k, v = (given[name] for name in _ARGUMENTS[:3])
    number, attention = layer.layer_number - 1, layer.self_attention
    check_forward(number, len(q), len(k))
    packed = given.get("packed_seq_params")
    is_packed = packed is not None and packed.qkv_format == "thd"
    batch = 1 if is_packed else q.shape[1]
    mask = padding_mask(watch.token_mask, number, batch, len(q), q.device)
    mask = None if mask is None else mask.T  # [time, batch], as q
    if is_packed:
        real = _packed_tokens(packed, len(q), attention.pg_collection.cp, q.device)
        mask = real if mask is None else real & mask[:, 0]
    tp = attention.pg_collection.tp
    observer.observe(
        number,
        q,
        k,
        v,
        mask,
        first_q_head=tp.rank() * q.shape[-2],
        first_kv_head=tp.rank() * observer.shape.kv_heads // tp.size(),
    )


def _packed_tokens(
    packed: Any, tokens: int, group: Any, device: torch.device
) -> Bool[Tensor, " tokens"]:
    """Which of this rank's packed tokens are real, without waiting for the device."""
    group = group if packed.cp_group is None else packed.cp_group  # dynamic context parallelism
    ranks = group.size() if packed.local_cp_size is None else packed.local_cp_size
    rank = group.rank() if ranks > 1 else 0
    ends = packed.cu_seqlens_q
    padded_ends = ends if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    starts = padded_ends // ranks  # where each sequence begins in what this rank holds
    token = torch.arange(tokens, device=device)
    which = torch.searchsorted(starts[1:], token, right=True).clamp(max=len(ends) - 2)
    offset = token - starts[which]
    chunk = padded_ends.diff()[which] // (2 * ranks)
    position = offset + chunk * torch.where(offset < chunk, rank, 2 * ranks - 2 - rank)
    real: Tensor = (token < starts[-1]) & (position < ends.diff()[which])
    return real
