"""The engines that a publisher updates, driven in step: one, or several replicas.

Every call goes to all engines at once. One that fails has given the update up; the others go on,
and it takes part again, introduced anew, in the next. Only when none is left does the call raise.
Which version each engine committed last is kept here, for deltas.

An engine that died since the last update is found out when the next one begins, before a byte is
sent: those that are left then meet without it. As long as it is away it holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from fp8rl.sync.errors import EnginesError
from fp8rl.sync.manifest import Base
from fp8rl.sync.transport import Outbox


@runtime_checkable
class SyncClient(Protocol):
    """The engine's control plane: the four methods of vLLM's ``VLLMWeightSyncClient``.

    A method raises what the engine found wrong, as a ValueError, RuntimeError or OSError, and soon:
    an engine that is away must not be waited for. The update has then ended there, so that the next
    one can begin. To ``update_weights`` with ``abandon`` it answers by doing just that.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell every worker who publishes and through which transport."""

    def start_weight_update(self) -> None:
        """Begin an update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take in a stage, or apply and prove a manifest; raises what the engine found wrong."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit the version and serve it."""


class _Engine:
    """One engine: the way to it, what it committed last, and what went wrong in this update."""

    def __init__(self, client: SyncClient) -> None:
        self.client = client
        self.base: Base | None = None
        self.introduced = False
        self.error: Exception | None = None


class Engines:
    """All engines of one publisher, numbered as they were given."""

    def __init__(
        self, clients: Sequence[SyncClient], publisher: str, outbox: Outbox, *, mirror: bool
    ) -> None:
        self._engines = [_Engine(client) for client in clients]
        self._publisher, self._outbox, self._mirror = publisher, outbox, mirror
        self._pool = ThreadPoolExecutor(len(clients), thread_name_prefix="fp8rl-engine")

    @property
    def failures(self) -> dict[int, Exception]:
        """The engines that left this update: number -> what they answered."""
        return {i: e.error for i, e in enumerate(self._engines) if e.error is not None}

    def introduce(self) -> None:
        """Introduce the publisher to all engines, if one of them does not know it.

        Raises the first engine's error where none can be reached.
        """
        for engine in self._engines:
            engine.error = None
        if not all(engine.introduced for engine in self._engines):
            self._meet()

    def rejoin(self) -> None:
        """Take the engines that left this update in again, to send it in another way."""
        for engine in self._engines:
            engine.error = None

    def common_base(self) -> Base | None:
        """The version that every engine here committed last, if it is one and the same."""
        bases = {engine.base for engine in self._engines if engine.error is None}
        return bases.pop() if len(bases) == 1 else None

    def start(self) -> None:
        """Begin an update on all engines; those that are left meet without one that is gone."""
        left = len(self.failures)
        self._on_all(lambda engine: engine.client.start_weight_update())
        while len(self.failures) > left:
            left = len(self.failures)
            self._meet()
            self._on_all(lambda engine: engine.client.start_weight_update())

    def update(self, content: dict[str, Any]) -> None:
        """Send a stage or a manifest to all engines."""
        info = {"publisher": self._publisher, **content}
        self._on_all(lambda engine: engine.client.update_weights(info))

    def finish(self, version: int, base: Base) -> None:
        """Commit on all engines; those that do hold ``base`` from now on."""
        self._on_all(lambda engine: engine.client.finish_weight_update(str(version)))
        for engine in self._engines:
            if engine.error is None:
                engine.base = base

    def abandon(self, reason: str) -> None:
        """Have every engine that is still in the update give it up; then all meet anew."""
        info = {"publisher": self._publisher, "abandon": reason}
        for engine in self._engines:
            engine.introduced = False
            if engine.error is None:
                with suppress(ValueError, RuntimeError, OSError):  # an error is on its way already
                    engine.client.update_weights(info)

    def close(self) -> None:
        """Stop the threads; the engines live on."""
        self.rejoin()  # an error's traceback would keep the ring
        self._pool.shutdown(wait=False)

    def _meet(self) -> None:
        """Introduce the publisher to those that have not left; who does not answer leaves."""
        for engine in self._engines:
            engine.introduced = False
        answers = [
            self._pool.submit(self._introduce, engine, introduction)
            for engine, introduction in zip(
                self._engines, self._outbox.introductions(), strict=True
            )
        ]
        self._outbox.connect(answers)
        for engine, answer in zip(self._engines, answers, strict=True):
            engine.error = _error_of(answer.exception())
            engine.introduced = engine.error is None
        self._raise_if_none_left()

    def _introduce(self, engine: _Engine, introduction: dict[str, Any]) -> None:
        if engine.error is not None:
            raise engine.error
        engine.client.init_weight_transfer_engine(
            {"transport": introduction, "publisher": self._publisher, "mirror": self._mirror}
        )

    def _on_all(self, call: Callable[[_Engine], None]) -> None:
        taking_part = [engine for engine in self._engines if engine.error is None]
        answers = [self._pool.submit(call, engine) for engine in taking_part]
        for engine, answer in zip(taking_part, answers, strict=True):
            engine.error = _error_of(answer.exception())
            if engine.error is not None:
                engine.base, engine.introduced = None, False
        self._raise_if_none_left()

    def _raise_if_none_left(self) -> None:
        errors = [engine.error for engine in self._engines]
        if any(error is None for error in errors):
            return
        if len(errors) == 1:
            assert errors[0] is not None
            raise errors[0]
        answers = "; ".join(f"engine {i}: {e}" for i, e in enumerate(errors))
        raise EnginesError(f"none of {len(errors)} engines took the update: {answers}")


def _error_of(raised: BaseException | None) -> Exception | None:
    """What a call raised; an interrupt goes on."""
    if raised is not None and not isinstance(raised, Exception):
        raise raised
    return raised
