"""vLLM's own `nccl` backend with Gloo in NCCL's place, so that it runs where no GPU is.

Both sides are vLLM's classes: what is announced, checked, loaded and finished, and when, is theirs.
Replaced are the communicator and the loops around it that need CUDA streams; packing and unpacking
are vLLM's functions. Trainer and worker are threads of one process and real ranks of a Gloo group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

BACKEND = "gloo_in_place_of_nccl"
BUFFER_BYTES = 300_000  # so that the model takes several, and cuts between data and scales
_STORES: dict[int, Any] = {}


def register() -> None:
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, "GlooEngine")


class Gloo:
    """A rank of two, with the calls that vLLM makes."""

    def __init__(self, rank: int, key: int) -> None:
        store = _STORES.setdefault(key, dist.HashStore())  # type: ignore[attr-defined]
        self._group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))  # type: ignore[attr-defined]

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        del self._group


class GlooEngine(NCCLWeightTransferEngine):
    """The worker's side."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.model_update_group = Gloo(1, init_info.master_port)  # type: ignore[assignment, arg-type]

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for chunk in self._chunks([(n, getattr(torch, d), s) for n, d, s in announced]):
            names, dtypes, shapes = ([one[i] for one in chunk] for i in range(3))
            sizes = [math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
            packed = torch.empty(sum(sizes), dtype=torch.uint8)
            self.model_update_group.broadcast(packed, src=0)  # type: ignore[union-attr, call-arg]
            self.model.load_weights(unpack_tensor(packed, names, shapes, dtypes, sizes))

    def _chunks(self, announced: list[tuple[str, torch.dtype, list[int]]]) -> Iterator[list[Any]]:
        """As the consumer of vLLM: a chunk ends with the tensor that exceeds the buffer."""
        chunk: list[Any] = []
        size = 0
        for name, dtype, shape in announced:
            chunk.append((name, dtype, shape))
            size += math.prod(shape) * dtype.itemsize
            if size > self.packed_buffer_size_bytes:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    """The trainer's side; `send_weights` is vLLM's."""

    @classmethod
    def over_gloo(cls, client: Any, source: Any) -> GlooTrainer:
        """Rendezvous with the worker, as `trainer_init` does."""
        trainer = cls(client=client, source=source, packed_buffer_size_bytes=BUFFER_BYTES)
        key = id(trainer)
        info = {"master_address": "", "master_port": key, "rank_offset": 1, "world_size": 2}
        with ThreadPoolExecutor(max_workers=1) as other:
            joined = other.submit(
                client.init_weight_transfer_engine,
                {**info, "packed": True, "packed_buffer_size_bytes": BUFFER_BYTES},
            )
            trainer.model_update_group = Gloo(0, key)  # type: ignore[assignment]
            joined.result()
        return trainer

    def _broadcast(self, source: Any, meta: Any) -> None:
        pairs = self._checked_iter(source, meta)
        while (chunk := pack_tensors(pairs, lambda pair: pair[1], BUFFER_BYTES)) is not None:
            self.model_update_group.broadcast(chunk.packed_tensor, src=0)  # type: ignore[union-attr]
