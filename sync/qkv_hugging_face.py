"""q, k and v of a Hugging Face model, from the attention interface that its layers call.

Every layer asks its modelling file's ``ALL_ATTENTION_FUNCTIONS`` for the function that its config's
``attn_implementation`` names, and calls that with q, k, v [batch, heads, time, d], after QK-norm
and RoPE and before keys are repeated for grouped queries. For the length of a ``watch`` the answer
is a function that observes and then calls the one that was asked for: sdpa, eager, or whatever is
registered. Configs, masks and entries of the table stay as they are; layers of other models only
pass through.

The table's ``get_interface`` is put in place on the object, and taken off again: entries of one's
own, the documented way, cannot call "eager", which is no entry but what each file falls back on.

Left out: multi-latent attention (refused), layers without k and v, and tensor parallelism by
transformers itself (its heads are reported as not observed).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8rl.quant import AttentionShape, KVObserver, KVScaleError
from fp8rl.sync.qkv_source import QKVWatch, check_forward, padding_mask

See = Callable[[Any, Tensor, Tensor, Tensor], None]
_TABLE: Final = "ALL_ATTENTION_FUNCTIONS"  # in each modelling file


class HuggingFaceQKV:
    """A ``QKVSource`` over a transformers model with causal self-attention in every layer.

    Padding is what the model's own ``attention_mask`` [batch, time] says, unless ``token_mask`` is
    set. Packed sequences (one row with ``position_ids``) have no padding, or a ``token_mask``.

    Raises:
        KVScaleError: the model has multi-latent attention, or no layers that call the interface.
    """

    def __init__(self, model: Any) -> None:
        self._decoder = model.get_decoder()
        config = self._decoder.config
        if getattr(config, "kv_lora_rank", None) is not None:
            raise KVScaleError(
                "this model has multi-latent attention, whose cache holds latents and not k and v; "
                "serve it with a BF16 KV cache"
            )
        self._tables = {
            module: table
            for module in self._decoder.modules()
            if hasattr(module, "layer_idx") and (table := _table(module)) is not None
        }
        if not self._tables:
            raise KVScaleError(
                f"no layer of {type(model).__name__} calls transformers' attention interface "
                f"({_TABLE}); measure in the engine"
            )
        q_heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
        self.shape = AttentionShape(config.num_hidden_layers, q_heads, kv_heads)

    @contextmanager
    def watch(self, observer: KVObserver) -> Iterator[QKVWatch]:
        """Feed ``observer`` with every forward inside the block; see ``QKVSource``."""
        watch = QKVWatch()
        attention_mask: list[Any] = [None]  # of the forward that runs

        def note(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
            attention_mask[0] = given.get("attention_mask")

        def see(module: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
            if module in self._tables and not watch.paused:
                check_forward(module.layer_idx, q.shape[2], k.shape[2])
                mask = watch.token_mask
                if mask is None:
                    mask = _real_tokens(attention_mask[0])
                mask = padding_mask(mask, module.layer_idx, q.shape[0], q.shape[2], q.device)
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                observer.observe(module.layer_idx, q, k, v, mask)

        with ExitStack() as stack:
            hook = self._decoder.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
            for table in {id(table): table for table in self._tables.values()}.values():
                stack.enter_context(_shown(table, see))
            yield watch


@contextmanager
def _shown(table: Any, see: See) -> Iterator[None]:
    """Let ``see`` see what is given to the functions that layers get from ``table``."""
    ask, outer = table.get_interface, vars(table).get("get_interface")

    def get_interface(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_show, see, ask(name, default))

    table.get_interface = get_interface
    try:
        yield
    finally:
        del table.get_interface
        if outer is not None:  # a watch around this one
            table.get_interface = outer


def _show(
    see: See,
    attend: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    see(module, query, key, value)
    return attend(module, query, key, value, *args, **kwargs)


def _real_tokens(attention_mask: Any) -> Tensor | None:
    """The model's ``attention_mask`` as a token mask."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        shape = list(getattr(attention_mask, "shape", []))
        raise KVScaleError(
            f"attention_mask is a {type(attention_mask).__name__} {shape}, which does not tell "
            "real tokens; set token_mask (bool [batch, time]) on what watch() returns"
        )
    return attention_mask.to(torch.bool)


def _table(module: nn.Module) -> Any:
    """The attention functions that a layer's modelling file has; None where it has none."""
    files = (sys.modules[base.__module__] for base in type(module).__mro__)
    return next((getattr(file, _TABLE) for file in files if hasattr(file, _TABLE)), None)
