"""The payload of an update as one engine worker collects it, in host memory of its own.

Stages come in order and without gap. How large a payload may be follows from the engine's own
model, so a hostile size is refused before memory is taken for it. The memory belongs to whoever
takes it: vLLM's reload keeps references to what it is given until a layer is complete, and the
mirror keeps the tensors of the version that was committed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import UInt8
from torch import Tensor

from fp8rl.quant import EngineTensor
from fp8rl.sync.errors import ManifestError
from fp8rl.sync.manifest import align
from fp8rl.sync.transport import Inbox, Stage


class Staging:
    """Collects one payload at a time."""

    def __init__(self, expected: Iterable[EngineTensor]) -> None:
        """``expected``: every tensor that the engine takes; no payload is larger than all."""
        sizes = (torch.Size(t.shape).numel() * t.dtype.itemsize for t in expected)
        self._limit = sum(align(size) for size in sizes)
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._filled = 0

    def receive(self, stage: Stage, inbox: Inbox) -> None:
        """Take in the next stage.

        Raises:
            ManifestError: it is not the next one, or of another payload, or too large.
            TransportError: its bytes could not be fetched.
        """
        if stage.start == 0:
            self._begin(stage.total)
        if stage.start != self._filled or stage.total != len(self._bytes):
            raise ManifestError(
                f"a stage begins at byte {stage.start} of {stage.total}, expected byte "
                f"{self._filled} of {len(self._bytes)}; send the payload again from its start"
            )
        end = stage.start + stage.nbytes
        if end > stage.total:
            raise ManifestError(f"a stage ends at byte {end} of a payload of {stage.total}")
        inbox.fetch(stage, self._bytes[stage.start : end])
        self._filled = end

    def take(self, nbytes: int) -> UInt8[Tensor, " nbytes"]:
        """Hand the payload over; ManifestError unless it is complete and of that size."""
        if self._filled != len(self._bytes) or self._filled != nbytes:
            raise ManifestError(
                f"a manifest of a payload of {nbytes} bytes came after {self._filled} of "
                f"{len(self._bytes)} bytes"
            )
        taken = self._bytes
        self.clear()
        return taken

    def clear(self) -> None:
        """Forget what was collected."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._filled = 0

    def _begin(self, total: int) -> None:
        if total > self._limit:
            raise ManifestError(
                f"a payload of {total} bytes is announced, but all tensors of this engine take "
                f"{self._limit}"
            )
        self._bytes = torch.empty(total, dtype=torch.uint8)
        self._filled = 0
