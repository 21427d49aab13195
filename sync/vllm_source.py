"""Our FP8 stream through vLLM's own trainers: the backends `nccl` and `ipc`, on CUDA.

    weights = VLLMWeights(source, plan)
    trainer = WeightTransferTrainerFactory.trainer_init(
        NCCLTrainerInitInfo(..., rank=rank), client=client, source=weights
    )
    weights.kv_scales = scales           # of this version, where the engine has an FP8 cache
    trainer.send_weights()               # on every trainer rank; vLLM's rank 0 sends

vLLM's contract for a source: `metadata` and iteration name the same tensors in the same order, with
the same dtypes and shapes. Here these are the engine's: E4M3 data, its `weight_scale_inv`, what
stays BF16, and behind the last tensor of a layer its KV scales, k and v together. With `nccl` the
tensors are needed on rank 0 alone. With `ipc` every trainer rank hands out its own copy to the
worker on its GPU, so pass all ranks as `to`.

These backends move and load; they do not prove. There is no manifest, no read-back and no version,
vLLM holds a mixture where a stream breaks, and its prefix cache is to be reset by whoever drives it
(``LLM.reset_prefix_cache``). Publisher and receiver of this room do all that.

Source: vLLM 0.32, distributed/weight_transfer (base.py, nccl_engine.py, ipc_engine.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta
from vllm.distributed.weight_transfer.base import WeightSource as VLLMWeightSource

from fp8rl.quant import FP32Source, KVScales, QuantizedTensor, QuantPlan
from fp8rl.quant.audit import SCALE_SUFFIX
from fp8rl.quant.plan import BLOCK_SIZE
from fp8rl.quant.tensor import FP8_DTYPE, scale_shape
from fp8rl.sync.errors import SourceError
from fp8rl.sync.source import TensorMeta, WeightSource, encoded, planned

SENDER: Final = 0  # vLLM's rule


class VLLMWeights(VLLMWeightSource):
    """A source of ours as vLLM's trainers take it, quantized as planned.

    kv_scales: sent with the weights; set it before every `send_weights`, or leave it None for an
    engine whose cache is BF16.
    """

    def __init__(
        self,
        source: WeightSource,
        plan: QuantPlan,
        *,
        to: Sequence[int] = (SENDER,),
        fp32_as: FP32Source | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Remember what to send.

        Args:
            source: the trainer's weights. plan: made from the config of the same model.
            to: trainer ranks that need the tensors: vLLM's sender, rank 0; with `ipc` all of them.
            fp32_as: what fp32 weights stand for, as in `quantize_blockwise`.
            device: where the tensors are put, the sender's GPU; None: where they arrive.
        """
        self._source, self._plan, self._to = source, plan, tuple(to)
        self._fp32_as, self._device = fp32_as, device
        self.kv_scales: KVScales | None = None

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor of the engine, in order; SourceError as iteration.

        A collective where that of the source is one.
        """
        metadata = self._source.metadata()
        scales = self._scales(metadata)
        found = []
        for meta, dtype in planned(metadata, self._plan, self._fp32_as):
            found.append(ParamMeta(meta.name, dtype, meta.shape))
            if dtype == FP8_DTYPE:
                blocks = scale_shape(meta.shape, BLOCK_SIZE)
                found.append(ParamMeta(meta.name + SCALE_SUFFIX, torch.float32, blocks))
            for name, scale in scales.get(meta.name, ()):
                found.append(ParamMeta(name, scale.dtype, tuple(scale.shape)))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors on the ranks `to`: a collective of all trainer ranks.

        Errors are those of `encoded`. What is yielded may be a view of a live parameter: vLLM is
        done with it when `send_weights` returns.
        """
        scales = self._scales(self._source.metadata())
        pairs = encoded(self._source, self._plan, to=self._to, fp32_as=self._fp32_as)
        for name, tensor in pairs:
            if isinstance(tensor, QuantizedTensor):
                yield name, self._put(tensor.data)
                yield name + SCALE_SUFFIX, self._put(tensor.scale_inv)
            else:
                yield name, self._put(tensor)
            for scale_name, scale in scales.get(name, ()):
                yield scale_name, self._put(scale)

    def _scales(self, metadata: Sequence[TensorMeta]) -> dict[str, list[tuple[str, Tensor]]]:
        """Name of the last tensor of each layer -> the layer's KV scales."""
        last = {_layer_of(meta.name): meta.name for meta in metadata}
        found: dict[str, list[tuple[str, Tensor]]] = {}
        scales = {} if self.kv_scales is None else self.kv_scales.tensors()
        for name, scale in scales.items():
            after = last.get(_layer_of(name))
            if after is None:
                raise SourceError(f"{name}: the source has no tensor of that layer")
            found.setdefault(after, []).append((name, scale))
        return found

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


def _layer_of(name: str) -> str:
    """Return the part of a tensor's name that is its layer's: `model.layers.3.`; else nothing."""
    found = re.match(r"model\.layers\.\d+\.", name)
    return "" if found is None else found[0]
