"""veRL's checkpoint engine `fp8rl`: a version goes from trainer rank 0 to all rollout workers.

    prepare               rank 0 opens a meeting point, and says where
    init_process_group    rank 0 and every rollout worker join one broadcast group (Gloo or NCCL)
    send_weights          rank 0 quantizes while the stages before are on their way; the other
                          trainer ranks run through the generator, which is a collective of theirs
    receive_weights       yields the stages, then the manifest, for the server adapter to bring to
                          the vLLM worker, which checks, loads and proves them
    finalize              all leave; the next update meets anew, with whoever is there

The bytes are FP8, sent once whatever the number of replicas. veRL calls both sides at the same
time; what a trainer rank finds wrong is told to the workers, so that nobody waits.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from fp8rl.integrations.verl.places import missing
from fp8rl.integrations.verl.settings import BACKEND, SyncSettings, check_bucket
from fp8rl.integrations.verl.wire import Sender, manifest_message, stage_message
from fp8rl.sync import TransportError, UpdateRefusedError
from fp8rl.sync.broadcast import BroadcastInbox, BroadcastOutbox
from fp8rl.sync.manifest import Manifest, parse_manifest
from fp8rl.sync.transport import Inbox, parse_introduction, parse_stage

LEFT_OUT: Final = -1  # the rank of trainer ranks that send nothing
PART_CHARACTERS: Final = 2**20  # a store takes no value above 8 MiB, and a manifest may be larger


@dataclass(frozen=True)
class Meeting:
    """Where rank 0 is met."""

    host: str
    port: int


class _Calls:
    """What rank 0 says to all workers, in order, through a store of its own."""

    def __init__(self, store: TCPStore) -> None:
        self._store, self._count = store, 0

    def say(self, content: dict[str, Any]) -> None:
        """Say something."""
        text, call = json.dumps(content), f"fp8rl/call/{self._count}"
        parts = range(0, len(text), PART_CHARACTERS)
        for number, start in enumerate(parts):
            self._store.set(f"{call}/{number}", text[start : start + PART_CHARACTERS])
        self._store.set(call, str(len(parts)))
        self._count += 1

    def hear(self) -> dict[str, Any]:
        """What is said next; TransportError where nothing is in time."""
        call = f"fp8rl/call/{self._count}"
        try:
            parts = range(int(self._store.get(call)))
            text = b"".join(self._store.get(f"{call}/{number}") for number in parts)
        except RuntimeError as error:
            raise TransportError(f"the trainer said nothing in time: {error}") from error
        self._count += 1
        said: dict[str, Any] = json.loads(text)
        return said


class FP8Transfer:
    """The engine, on a trainer rank or in a rollout worker; veRL's interface is put on top."""

    wire_format = "fp8rl"

    def __init__(self, bucket_size: int, is_master: bool = False, **engine_kwargs: Any) -> None:
        """Set up; nothing is opened yet.

        Args:
            bucket_size: veRL's, bytes. is_master: of trainer rank 0. engine_kwargs: `SyncSettings`.

        Raises:
            WeightSyncError: buckets that are smaller than a stage. ValidationError: engine_kwargs.
        """
        check_bucket(bucket_size)
        self._settings = SyncSettings.model_validate(engine_kwargs)
        self._sender = Sender(self._settings) if is_master else None
        self._rank = LEFT_OUT
        self._store: TCPStore | None = None
        self._calls: _Calls | None = None
        self._outbox: BroadcastOutbox | None = None
        self._inbox: Inbox | None = None

    def prepare(self) -> Meeting | None:
        """Open the meeting point on rank 0."""
        if self._sender is None:
            return None
        host = _own_address()
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            self._store = TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._settings.timeout_seconds),
                master_listen_fd=listener.detach(),
            )
        return Meeting(host, port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 sends, the other trainer ranks take no part, rollout workers are 0, 1, ..."""
        meeting = metadata[0]
        if not isinstance(meeting, Meeting):
            raise TransportError(f"trainer rank 0 opened no meeting point, found {meeting!r}")

        def everybody(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "workers": [rollout_world_size] * len(ranks),
                "meeting": [meeting] * len(ranks),
            }

        trainers = [0] + [LEFT_OUT] * (actor_wg_world_size - 1)
        return everybody(trainers), everybody(list(range(rollout_world_size)))

    def init_process_group(self, rank: int, workers: int, meeting: Meeting) -> None:
        """Join; TransportError where not everybody does in time."""
        self._rank = rank
        if rank == LEFT_OUT:
            return
        if self._sender is None:
            self._join(meeting)
            return
        assert self._store is not None  # prepare comes first
        self._calls = _Calls(self._store)
        self._outbox = BroadcastOutbox(
            self._sender.payload_nbytes,
            [workers],
            self._settings.transport or ("nccl" if torch.cuda.is_available() else "gloo"),
            meeting.host,
            self._settings.timeout_seconds,
        )
        self._calls.say(self._outbox.introductions()[0])
        self._outbox.connect()

    def finalize(self) -> None:
        """Leave the group."""
        if self._outbox is not None:
            self._outbox.close()
        if self._inbox is not None:
            self._inbox.close()
        self._outbox = self._inbox = self._calls = self._store = None

    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Send a version from rank 0; returns what it weighed. Errors are those of `Sender`."""
        if self._rank == LEFT_OUT:
            for _ in weights:
                pass
            return {}
        assert self._sender is not None and self._outbox is not None and self._calls is not None
        self._outbox.begin(self._sender.payload_nbytes, self._calls.say)
        sent = False
        try:
            for piece in self._sender.pieces(weights, global_steps):
                if isinstance(piece, Manifest):
                    self._outbox.finish()
                    self._calls.say({"manifest": piece.model_dump(mode="json")})
                else:
                    self._outbox.write(piece)
            sent = True
        finally:
            if not sent:  # whatever veRL's generator raised, the workers wait for a word
                error = sys.exception()
                self._outbox.abandon()
                self._calls.say({"abandon": f"{type(error).__name__}: {error}"})
        return {"checkpoint_engine/payload_mbytes": self._sender.payload_nbytes / 2**20}

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, Tensor], None]:
        """Yield stages and manifest as named tensors (`wire.py`).

        Raises:
            UpdateRefusedError: the trainer gave the update up. TransportError: it is not there.
        """
        assert self._calls is not None and self._inbox is not None  # init_process_group came
        while True:
            said = self._calls.hear()
            if "stage" in said:
                stage = parse_stage(said["stage"])
                data = torch.empty(stage.nbytes, dtype=torch.uint8)
                self._inbox.fetch(stage, data)
                yield stage_message(stage, data)
            elif "manifest" in said:
                yield manifest_message(parse_manifest(said["manifest"]))
                return
            else:
                raise UpdateRefusedError(f"the trainer gave the update up: {said.get('abandon')}")

    def _join(self, meeting: Meeting) -> None:
        seconds = timedelta(seconds=self._settings.timeout_seconds)
        try:
            store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=seconds)
        except (RuntimeError, ValueError) as error:
            raise TransportError(
                f"the trainer cannot be met at {meeting.host}:{meeting.port}: {error}"
            ) from error
        self._store, self._calls = store, _Calls(store)
        introduction = parse_introduction(self._calls.hear())
        assert introduction.kind == "broadcast"
        self._inbox = BroadcastInbox(introduction, self._rank)


def install(base: ModuleType) -> None:
    """Register the engine as veRL's backend `fp8rl`."""
    registry = getattr(base, "CheckpointEngineRegistry", None)
    interface = getattr(base, "CheckpointEngine", None)
    if registry is None or interface is None:
        missing(f"{base.__name__}.CheckpointEngineRegistry")
        return
    registry.register(BACKEND)(type("FP8CheckpointEngine", (FP8Transfer, interface), {}))


def _own_address() -> str:
    """This node's address, as the others reach it."""
    import ray

    node: Any = ray.util
    return str(node.get_node_ip_address()).strip("[]")
