"""What a worker's live model shows of itself while it is watched.

Either q, k and v, which go to an observer, for KV scales (``qkv_engine.py``); or the experts that
each token goes to (``routing_engine.py``), or the residual stream (``streams_engine.py``), or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from fp8rl.quant import KVObserver, KVScales
from fp8rl.sync.errors import ManifestError, RoutingError, StreamError
from fp8rl.sync.qkv_engine import EngineQKV
from fp8rl.sync.routing_engine import EngineRouters, EngineRoutes
from fp8rl.sync.streams import pack
from fp8rl.sync.streams_engine import EngineStreams, StreamsSeen


class EngineWatch:
    """The watch on one model; beginning another ends the one before."""

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        self._model, self._config = model, config
        self._observer: KVObserver | None = None
        self._routes: EngineRoutes | None = None
        self._streams: StreamsSeen | None = None
        self._hooks = ExitStack()

    def start_qkv(self, in_use: KVScales | None, histogram: bool) -> None:
        """Feed an observer with every forward; see ``KVObserver`` for what it is told to keep."""
        self.stop()
        source = EngineQKV(self._model, self._config)
        self._observer = KVObserver(source.shape, histogram=histogram, in_use=in_use)
        self._hooks.enter_context(source.watch(self._observer))

    def end_qkv(self) -> dict[str, Any]:
        """Stop; returns what was seen, as JSON of a ``KVObservation``."""
        if self._observer is None:
            raise ManifestError("end_observation came before start_observation")
        observer = self._observer
        self.stop()
        return observer.observation().to_json()

    def start_routes(self) -> None:
        """Write down the experts that every forward chooses."""
        self.stop()
        self._routes = self._hooks.enter_context(EngineRouters(self._model, self._config).watch())

    def routes(self, sequences: Sequence[Sequence[int]]) -> list[list[list[list[int]]]]:
        """For each sequence, token and layer the experts, first choice first, so far."""
        if self._routes is None:
            raise RoutingError("the routers are not watched; start_routes comes first")
        return [self._routes.of(sequence).tolist() for sequence in sequences]

    def start_streams(self, routes: bool) -> None:
        """Write down the residual stream of every forward; with ``routes`` the experts too."""
        self.stop()
        if routes:
            self.start_routes()
        self._streams = self._hooks.enter_context(EngineStreams(self._model, self._config).watch())

    def streams(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The stream of these sequences' tokens but the last of each, as ``pack`` gives it."""
        if self._streams is None:
            raise StreamError("the stream is not watched; start_streams comes first")
        return pack(self._streams.of(sequences))

    def stop(self) -> None:
        """Take every hook away, and forget what was seen."""
        self._hooks.close()
        self._observer = self._routes = self._streams = None
