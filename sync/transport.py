"""How the bytes of an update travel: one interface, one file a transport.

The trainer's side has an ``Outbox``, each engine worker an ``Inbox``. What is sent is a payload: a
run of bytes, written in order and cut into stages of bounded size. A stage is announced through the
engine's control plane (vLLM's ``update_weights``), so the two sides need no other protocol:

    outbox.write(bytes) ... -> {"stage": {...}} -> inbox.fetch(stage, out)

    shm        a ring in shared memory: one host                                  ``shm.py``
    broadcast  torch.distributed, Gloo or NCCL: several engines, several hosts    ``broadcast.py``
    files      a folder or an object store: no network between them              ``files.py``

The engine copies a stage into memory of its own while the trainer quantizes the next. Nothing of it
is applied before the manifest has come and fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from jaxtyping import UInt8
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)
from pydantic import ValidationError as PydanticError
from torch import Tensor

from fp8rl.sync.errors import ManifestError
from fp8rl.sync.manifest import told

STAGE_BYTES = 64 * 2**20  # of one stage at most; two are under way at once

Send = Callable[[dict[str, Any]], None]
Start = Callable[[], None]


@runtime_checkable
class Outbox(Protocol):
    """The trainer's side of a transport to one or more engines."""

    def introductions(self) -> list[dict[str, Any]]:
        """What the workers of each engine must know to open their inbox, as JSON values."""
        ...

    def connect(self, answers: Sequence[Future[None]] = ()) -> None:
        """Meet the engines, which open their inboxes meanwhile; returns when all are there.

        answers: of the engines; one whose answer is an error does not come.
        """
        ...

    def begin(self, nbytes: int, send: Send, start: Start | None = None) -> None:
        """Begin a payload of ``nbytes``; ``send`` announces a stage to all engines and waits.

        ``start`` is called before the first stage is sent: in it, who takes part may change.
        """
        ...

    def write(self, data: UInt8[Tensor, " n"]) -> None:
        """Append bytes to the payload; the caller may change ``data`` afterwards."""
        ...

    def finish(self) -> None:
        """Return when every engine has all bytes; raises what went wrong on the way."""
        ...

    def abandon(self) -> None:
        """Forget the payload that was begun; a new one may follow."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@runtime_checkable
class Inbox(Protocol):
    """An engine worker's side of a transport."""

    def fetch(self, stage: Stage, out: UInt8[Tensor, " n"]) -> None:
        """Fill ``out`` (host memory) with the bytes of the stage; raises TransportError."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Stage(BaseModel):
    """Bytes ``start`` up to ``start + nbytes`` of a payload of ``total``.

    at: where they lie, for transports that have places: an offset in the ring, or in a version's
    file. version: the one whose file it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: NonNegativeInt
    nbytes: PositiveInt
    total: PositiveInt
    at: NonNegativeInt = 0
    version: NonNegativeInt | None = None


class ShmIntroduction(BaseModel):
    """A ring in shared memory: ``path`` and ``nbytes`` of its segment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shm"] = "shm"
    path: str
    nbytes: PositiveInt


class BroadcastIntroduction(BaseModel):
    """A process group of the trainer's sender (rank 0) and the workers of all engines that come.

    host, port: where they meet. first_rank: of this engine's workers, if all come.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["broadcast"] = "broadcast"
    backend: Literal["gloo", "nccl"]
    host: str
    port: PositiveInt
    first_rank: PositiveInt
    timeout_seconds: PositiveFloat


class FilesIntroduction(BaseModel):
    """A folder or any fsspec store, as its URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["files"] = "files"
    url: str


Introduction = Annotated[
    ShmIntroduction | BroadcastIntroduction | FilesIntroduction, Field(discriminator="kind")
]
_INTRODUCTION: TypeAdapter[Introduction] = TypeAdapter(Introduction)


def parse_introduction(raw: Any) -> Introduction:
    """Validate what a trainer says of its transport; raises ManifestError."""
    try:
        return _INTRODUCTION.validate_python(raw)
    except PydanticError as error:
        raise ManifestError(f"transport refused at {told(error, 'transport')}") from error


def parse_stage(raw: Any) -> Stage:
    """Validate a stage that came over a wire; raises ManifestError."""
    try:
        return Stage.model_validate(raw)
    except PydanticError as error:
        raise ManifestError(f"stage refused at {told(error, 'stage')}") from error
