"""q, k and v of the live engine, from pre-hooks on vLLM's attention layers, inside its worker.

What a layer is given is what enters its cache: q [tokens, heads * d], k and v [tokens, kv heads *
d], after QK-norm and RoPE and before any quantization. Of the rows only the first
``num_actual_tokens`` are real; the rest pads to a size. Forwards without attention metadata
(profiling, warm-up) compute on nothing and are not observed. Tokens whose keys and values the
prefix cache already has are not computed and not seen: reset it before.

A model that runs compiled or as CUDA graphs was traced before the watch and calls no hooks. What
decides is ``compilation_config.mode`` and ``.cudagraph_mode``; ``enforce_eager=True`` turns both
off. Left out: dual-batch overlap, layers that share another's cache, multi-latent attention (all
refused), and joining workers: each observes its own heads and layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from fp8rl.quant import AttentionShape, KVObserver, KVScaleError
from fp8rl.sync.qkv_source import QKVWatch, shown

_ARGUMENTS: Final = ("query", "key", "value")


class EngineQKV:
    """A ``QKVSource`` over a worker's vLLM model; its tokens are packed, so it takes no mask.

    Raises:
        KVScaleError: the engine runs compiled or as CUDA graphs, or the model has attention layers
            without k and v of their own.
    """

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        if how := compiled(config):
            raise KVScaleError(
                f"the engine runs with {how}, which show nothing of q, k and v; start it with "
                "enforce_eager=True, or measure in the trainer"
            )
        self._layers = [module for module in model.modules() if isinstance(module, Attention)]
        if not self._layers:
            raise KVScaleError(
                f"{type(model).__name__} has no attention layer with k and v (multi-latent "
                "attention caches latents); serve it with a BF16 KV cache"
            )
        for layer in self._layers:
            if layer.kv_sharing_target_layer_name is not None:
                raise KVScaleError(
                    f"{layer.layer_name} uses the cache of {layer.kv_sharing_target_layer_name} "
                    "and has no k and v of its own; serve this model with a BF16 KV cache"
                )
        whole, parallel = config.model_config, config.parallel_config
        self.shape = AttentionShape(
            whole.get_total_num_hidden_layers(),
            whole.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
            whole.get_total_num_kv_heads(),
        )
        self._ranks = parallel.tensor_parallel_size

    @contextmanager
    def watch(self, observer: KVObserver) -> Iterator[QKVWatch]:
        """Feed ``observer`` with every forward inside the block; see ``QKVSource``."""
        watch = QKVWatch()
        see = partial(_see, observer, watch, self._ranks)
        with shown((layer, see) for layer in self._layers):
            yield watch


def compiled(config: VllmConfig) -> str | None:
    """Say how an engine runs whose model calls no hooks; None if it calls them."""
    compilation = config.compilation_config
    mode, graphs = CompilationMode(compilation.mode), compilation.cudagraph_mode
    if mode == CompilationMode.NONE and graphs == CUDAGraphMode.NONE:
        return None
    return f"compilation mode {mode.name} and cudagraph_mode {graphs.name}"


def _see(
    observer: KVObserver,
    watch: QKVWatch,
    ranks: int,
    layer: Attention,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """The pre-hook: show the real tokens among what an attention layer is given."""
    if watch.paused:
        return
    if watch.token_mask is not None:
        raise KVScaleError("the engine knows its real tokens; leave token_mask at None")
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return
    if isinstance(metadata, list):
        raise KVScaleError(
            f"{layer.layer_name}: the engine overlaps two batches (enable_dbo), whose tokens "
            "cannot be told apart; turn it off, or measure in the trainer"
        )
    real = metadata[layer.layer_name].num_actual_tokens
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    by_token = [
        given[name][:real].reshape(real, count, -1)
        for name, count in zip(_ARGUMENTS, heads, strict=True)
    ]
    rank = get_tensor_model_parallel_rank()
    observer.observe(
        extract_layer_index(layer.layer_name),
        *by_token,
        first_q_head=rank * layer.num_heads,
        first_kv_head=rank * observer.shape.kv_heads // ranks,
    )
