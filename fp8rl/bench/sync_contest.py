"""The ways of `fp8rl bench sync`, their engines, and the weights that all of them bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from fp8rl.bench import memory
from fp8rl.bench.sync_model import Policy, Shape
from fp8rl.bench.sync_ways import (
    DELTA,
    DISK,
    FLOOR,
    FULL,
    THERE,
    Disk,
    Engine,
    Floor,
    Ours,
    There,
    Turn,
    Way,
    write_checkpoint,
)
from fp8rl.errors import EngineError
from fp8rl.sync import IterableSource
from fp8rl.sync.source import encoded

WAYS = (FLOOR, FULL, THERE, DELTA, DISK)
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class Taken:
    """Bytes in the trainer and in the engine."""

    trainer: int
    engine: int


class Contest:
    """Holds everything while the ways take turns; close it by the stack that it was given.

    What needs whole FP8 versions shares an engine; deltas have one of their own, since they build
    on what was published before; so has reload_weights, which quantizes by itself.
    """

    def __init__(self, shape: Shape, folder: Path, stack: ExitStack) -> None:
        """Start the engines and draw the weights; their logs go into ``folder``."""
        settings = shape.settings()
        shared = stack.enter_context(Engine(settings, folder / "full"))
        alone = stack.enter_context(Engine(settings, folder / "delta"))
        plan = settings.plan()
        self._policy = Policy(plan)
        weights = self._policy.weights
        checkpoint = write_checkpoint(folder / "disk", weights)
        stack.callback(checkpoint.unlink)
        online = stack.enter_context(Engine(shape.online(), folder / "disk"))
        self._engines = {FLOOR: shared, FULL: shared, THERE: shared, DELTA: alone, DISK: online}
        self._openings: Mapping[str, Callable[[], Way]] = {
            FLOOR: lambda: Floor(shared, plan, weights),
            FULL: lambda: Ours(shared, plan, weights, deltas=False),
            THERE: lambda: There(shared, weights),
            DELTA: lambda: Ours(alone, plan, weights, deltas=True),
            DISK: lambda: Disk(online, checkpoint),
        }
        self._ways: dict[str, Way] = {}
        self._stack = stack
        self._version = 0
        for _ in encoded(IterableSource(weights), plan, to=[0]):
            pass  # compiles the cast
        for engine in (shared, alone, online):
            engine.wait_ready()

    def open(self, name: str) -> Taken | None:
        """Open a way and take a turn; tells what it keeps. The floor's is the first.

        None where the system cannot tell. Raises EngineError where it does not bring what the floor
        does, byte for byte; reload_weights has other scales and is not compared.
        """
        engine = self._engines[name]
        before = _resident(engine)
        self._ways[name] = self._stack.enter_context(closing(self._openings[name]()))
        self._ways[name].turn(self._version)
        after = _resident(engine)
        if engine is self._engines[FLOOR] and (wrong := engine.ask("differences")):
            raise EngineError(f"{name} brought other bytes: {'; '.join(wrong[:DIFFERENCES_SHOWN])}")
        if before is None or after is None:
            return None
        return Taken(after.trainer - before.trainer, after.engine - before.engine)

    def step(self) -> None:
        """Go on to the next version of the weights."""
        self._version += 1
        self._policy.step()
        self._floor().fill()

    def turn(self, name: str) -> Turn:
        """Let a way bring it."""
        return self._ways[name].turn(self._version)

    def peak(self, name: str) -> Taken | None:
        """As ``turn``; tells what is taken at most on top of what was before."""
        process = self._engines[name].pid
        before = _resident(self._engines[name])
        if before is None:
            self.turn(name)
            return None
        memory.start_high_water_mark()
        memory.start_high_water_mark(process)
        self.turn(name)
        return Taken(
            memory.high_water_mark() - before.trainer,
            memory.high_water_mark(process) - before.engine,
        )

    def fingerprints(self) -> tuple[float, float]:
        """Tell the seconds that fingerprinting the version takes in the trainer, in the engine."""
        return self._floor().fingerprints()

    def _floor(self) -> Floor:
        floor = self._ways[FLOOR]
        assert isinstance(floor, Floor)
        return floor


def _resident(engine: Engine) -> Taken | None:
    """What is resident on both sides, once they have given back what they do not use."""
    if not memory.can_tell():
        return None
    memory.give_back()
    engine.ask("give_back")
    return Taken(memory.resident(), memory.resident(engine.pid))
