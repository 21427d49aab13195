"""The residual stream of a model, as the engine shows it for some sequences, and as it travels.

A decoder adds to one stream what each layer makes of it: h[0] is the embedding, h[l + 1] what
stands after layer l. vLLM hands it on in two parts, which its fused kernels add; Megatron as their
sum. Both sums are BF16, so that it is the same quantity, number by number.

The stream is sent as base64 of its bytes in a line of JSON: a list of floats would be several times
as long, and slower by more.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

from fp8rl.sync.errors import StreamError


@dataclass(frozen=True, eq=False)
class StreamObservation:
    """What an engine shows of sequences, computed whole; a sequence's tokens follow each other.

    stream: bf16 [tokens, layers + 1, hidden], the last token of each sequence left out, whose
    stream decides nothing in it. logprobs: fp32 [tokens], of the token that follows each, at
    temperature 1. routes: experts [tokens, layers, k], first choice first; None without experts.
    """

    stream: BFloat16[Tensor, "tokens points hidden"]
    logprobs: Float32[Tensor, " tokens"]
    routes: Int64[Tensor, "tokens layers k"] | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``EngineServer.observe_streams`` answers.

        Raises:
            StreamError: the three are not of equally many tokens.
        """
        stream = unpack(value["stream"])
        logprobs = torch.tensor(value["logprobs"], dtype=torch.float32)
        routes = None
        if value["routes"] is not None:
            routes = torch.tensor(value["routes"], dtype=torch.int64)
        if len(stream) != len(logprobs) or (routes is not None and len(routes) != len(stream)):
            raise StreamError(
                f"the engine showed the stream of {len(stream)} tokens and {len(logprobs)} "
                "log-probs; of a prompt it must show both for every token but the last"
            )
        return cls(stream, logprobs, routes)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "stream": pack(self.stream),
            "logprobs": self.logprobs.tolist(),
            "routes": None if self.routes is None else self.routes.tolist(),
        }


def pack(stream: Tensor) -> dict[str, Any]:
    """A BF16 tensor as JSON values."""
    data = stream.bfloat16().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return {"shape": list(stream.shape), "data": base64.b64encode(data).decode()}


def unpack(packed: Mapping[str, Any]) -> Tensor:
    """What ``pack`` was given; raises StreamError where bytes and shape do not fit."""
    shape: Sequence[int] = packed["shape"]
    data = bytearray(base64.b64decode(packed["data"]))
    if len(data) != 2 * math.prod(shape):
        raise StreamError(f"{len(data)} bytes came for a BF16 tensor of shape {list(shape)}")
    return torch.frombuffer(data, dtype=torch.bfloat16).view(*shape)
