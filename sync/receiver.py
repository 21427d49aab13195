"""The engine's side of an update: a vLLM weight-transfer backend that proves what it loaded.

One update is one transaction, run inside each vLLM worker:

    stages     copied into memory of our own; the engine serves on
    manifest   may it come in? (``admission.py``) -> decode, check fingerprints -> load what changed
               through vLLM's layerwise reload, write the KV scales -> read back, compare
    finish     commit: the mirror is exchanged, the version counts

The scales may come in a second manifest of the same update, measured in between on the very weights
just applied; until they come the model computes with the scales committed last. Everything up to
the load is checked before the first byte is applied; a failure there changes nothing. One after
that is undone from the mirror, and the old version proven again. Where no mirror is kept, or the
undoing fails, ``failure`` says why until a good update lands; whoever drives the engine serves
nothing while it is set. Prefix-cache reset needs the scheduler and is done by the engine process
after the commit.

What a worker cannot take it refuses without raising: ``report`` says why, and whoever drives the
engine asks for it after every call (``engine/server.py``, ``vllm_engines.py``).

A trainer that dies in the midst leaves an update that was applied and not committed: nothing is
served until it is undone, by ``abandon`` or by the next publisher that introduces itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from fp8rl.quant import KVObservation, KVScales
from fp8rl.sync.engine_kernels import activations
from fp8rl.sync.engine_scales import (
    held_scales,
    read_scales,
    refuse_unsupported,
    scale_differences,
)
from fp8rl.sync.engine_watch import EngineWatch
from fp8rl.sync.errors import ManifestError, NotIntroducedError, PublisherError
from fp8rl.sync.inboxes import open_inbox
from fp8rl.sync.manifest import parse_manifest
from fp8rl.sync.staging import Staging
from fp8rl.sync.transaction import Transaction, UpdateReport
from fp8rl.sync.transport import Inbox, parse_introduction, parse_stage

logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Who publishes, through which transport, and whether each worker keeps a mirror."""

    publisher: str
    transport: dict[str, Any]
    mirror: bool = True


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One step of an update: a stage of its payload, its manifest, or the reason to give it up."""

    publisher: str
    stage: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    abandon: str | None = None


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives FP8 weights and KV scales in one vLLM worker (backend ``fp8rl``)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        refuse_unsupported(model, vllm_config.compilation_config)
        self.weights = Transaction(model, self.model_config)
        self._committed: UpdateReport | None = None
        self._refusal: str | None = None
        self._session = False  # vLLM's, from start to finish
        self._abandoned = False
        self._staging = Staging(self.weights.expected.values())
        self._staging_seconds = 0.0
        self._sleep_level: int | None = None
        self._publisher: str | None = None
        self._inbox: Inbox | None = None
        self._keep_mirror = True
        self._watch = EngineWatch(model, vllm_config)

    @property
    def version(self) -> int | None:
        """The version that was proven and committed last."""
        return self.weights.held.base.version if self.weights.held is not None else None

    @property
    def failure(self) -> str | None:
        """Why nothing may be served; None where all is well."""
        if self._sleep_level is not None:
            return f"the engine sleeps (level {self._sleep_level}); wake it up"
        return self.weights.failure

    def report(self) -> dict[str, Any]:
        """What this worker holds, and what it says of the last call, as JSON values.

        refusal: why the last call, or one before it in this session, was refused; None if none was.
        unready: why the update cannot be finished yet. session: whether vLLM's is open.
        activations: in what each FP8 layer takes its input, read live.
        """
        last = self._committed
        return {
            "backend": type(self).__name__,
            "version": self.version,
            "failure": self.failure,
            "error": self.weights.last_error,
            "refusal": self._refusal,
            "unready": self.weights.unready,
            "session": self._session,
            "activations": activations(self.model),
            "digest": last.digest if last else None,
            "tensors_proven": last.tensors_proven if last else 0,
            "kv_scales_proven": last.kv_scales_proven if last else 0,
            "units_loaded": last.units_loaded if last else 0,
            "seconds": dict(last.seconds) if last else {},
        }

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Open a publisher's transport; it takes the place of the one before.

        What that one left unfinished is undone. Refused where the transport cannot be opened.
        """
        self._refusal = None
        with self._refusing():
            introduction = parse_introduction(init_info.transport)
            self.shutdown()
            self._drop(f"publisher {init_info.publisher} took over")
            self._inbox = open_inbox(introduction, self.parallel_config.rank)
            self._publisher, self._keep_mirror = init_info.publisher, init_info.mirror

    def start_weight_update(self) -> None:
        """Begin. The version held is served on until a manifest is applied.

        Refused where no publisher has introduced itself.
        """
        self._session, self._refusal = True, None
        with self._refusing():
            self._introduced()
            self._drop("a new update began before it was finished")

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take in a stage, or apply and prove a manifest, or give the update up.

        Refused for all that ``Transaction.apply`` and ``Staging.receive`` raise, and where another
        publisher has introduced itself. After a refusal the rest of the session is refused too.
        """
        if update_info.abandon is not None:
            self._drop(update_info.abandon)
            self._abandoned = True
        elif self._refusal is None:
            with self._refusing():
                self._check_publisher(update_info.publisher)
                self._take(update_info)

    def finish_weight_update(self) -> None:
        """Commit the version that was applied and proven; nothing after it was given up.

        Raises ManifestError, KVScaleError where it is not complete; see ``unready`` before.
        """
        if not self._abandoned:
            self._watch.stop()
            committed = self.weights.commit(keep=self._keep_mirror)
            seconds = {"stage": self._staging_seconds, **committed.seconds}
            self._committed = replace(committed, seconds=seconds)
        self._session = self._abandoned = False

    def shutdown(self) -> None:
        """Let go of the transport; the weights stay."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        self._publisher = None

    def kv_state(self) -> dict[str, dict[str, list[float]]]:
        """The KV scales that the live model holds: layer -> q, k or v -> its copies.

        The copies are the device scale, the float mirror and, for k and v, the CPU copy.
        """
        return read_scales(self.model)

    def scale_problems(self) -> list[str]:
        """Compare the live model's KV scales with those committed; one line for each that differs.

        Empty where all is well, or nothing was committed yet.
        """
        held = self.weights.held
        return scale_differences(self.model, held.scales) if held and held.scales else []

    def start_observation(self, in_use: bool, histogram: bool) -> None:
        """Have every forward of the model feed an observer, until ``end_observation``.

        in_use: count clipping against the scales held now. histogram: keep what percentiles need.
        Raises ManifestError unless an update is under way whose weights are applied.
        """
        if self.weights.applied_version is None:
            raise ManifestError(
                "KV scales are observed on weights that an update has just applied; begin an "
                "update and send its weights first"
            )
        held = held_scales(self.model, self.version or 0) if in_use else None
        self._watch.start_qkv(held, histogram)

    def end_observation(self) -> dict[str, Any]:
        """Stop observing; returns what was seen, as JSON of a ``KVObservation``."""
        return self._watch.end_qkv()

    def start_routes(self) -> None:
        """Have every forward write down the experts it chooses, until ``stop_watching``."""
        self._watch.start_routes()

    def routes(self, sequences: list[list[int]]) -> list[list[list[list[int]]]]:
        """The experts of each sequence, token and layer, first choice first."""
        return self._watch.routes(sequences)

    def start_streams(self, routes: bool) -> None:
        """Have every forward write down the residual stream, and the experts where asked to."""
        self._watch.start_streams(routes)

    def streams(self, sequences: list[list[int]]) -> dict[str, Any]:
        """The stream of these sequences, as JSON values."""
        return self._watch.streams(sequences)

    def stop_watching(self) -> None:
        """Watch no longer, and forget what was seen."""
        self._watch.stop()

    def hold_scales_for(self, seen: dict[str, Any]) -> bool:
        """Compute on under scales that clip nothing of what was observed; False if none does now.

        They are for measuring only: the scales to be published are still awaited. Raises
        KVScaleError where NaN, Inf or only zeros were observed.
        """
        observation = KVObservation.from_json(seen)
        version = self.weights.applied_version
        if version is None or not bool(observation.saturation().any()):
            return False
        fitting = KVScales.from_amax(observation.amax(), version=version, tokens=observation.tokens)
        self.weights.hold_scales(fitting.tensors())
        return True

    def slept(self, level: int) -> None:
        """Say that the engine went to sleep; level 2 discards its weights.

        An update that was under way is lost.
        """
        self._drop("the engine went to sleep")
        self._sleep_level = level
        if level == 2:
            self.weights.discard(
                "the engine slept at level 2, which discarded its weights; publish"
            )

    def woke(self) -> None:
        """Say that the engine is awake: write the committed KV scales again and prove them.

        vLLM up to 0.28 sets them to 1.0 when the cache wakes. Raises ReadBackError.
        """
        self._sleep_level = None
        self.weights.restore_scales()

    def forget(self) -> None:
        """Say that another run begins, whose versions begin anew; what is held is served no more.

        An update that was under way is lost.
        """
        self._drop("another run began")
        self._committed = None
        self.weights.forget()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn an error into a refusal, which whoever called asks for (``report``).

        vLLM takes the answers of several workers in turn, and leaves the others' in its queues
        when one has failed: every answer after that would be that of an older call.
        """
        try:
            yield
        except (ValueError, RuntimeError) as error:
            self._refusal = f"{type(error).__name__}: {error}"
            self._drop(self._refusal)
            self.weights.last_error = self._refusal
            logger.warning("fp8rl refused an update: %s", self._refusal)

    def _introduced(self) -> Inbox:
        """The open inbox; NotIntroducedError where there is none."""
        if self._inbox is None:
            raise NotIntroducedError(
                "no publisher is known to this engine, or its transport broke; "
                "init_weight_transfer_engine comes first, also after the engine was restarted"
            )
        return self._inbox

    def _check_publisher(self, publisher: str) -> None:
        if self._publisher is not None and publisher != self._publisher:
            raise PublisherError(
                f"publisher {publisher} was replaced: this engine takes its updates from "
                f"{self._publisher} now; one trainer publishes to an engine at a time"
            )

    def _take(self, update_info: UpdateInfo) -> None:
        if update_info.stage is not None:
            self._receive_stage(update_info.stage)
        elif update_info.manifest is not None:
            manifest = parse_manifest(update_info.manifest)
            payload = self._staging.take(manifest.payload_nbytes)
            self.weights.apply(manifest, payload)
        else:
            raise ManifestError("update_weights came with neither a stage nor a manifest")

    def _receive_stage(self, raw: dict[str, Any]) -> None:
        stage = parse_stage(raw)
        inbox = self._introduced()
        if stage.start == 0:
            self._staging_seconds = 0.0
        began = time.perf_counter()
        try:
            self._staging.receive(stage, inbox)
        except (ValueError, RuntimeError):
            self.shutdown()  # the trainer may wait in a broadcast, which this ends
            raise
        self._staging_seconds += time.perf_counter() - began

    def _drop(self, reason: str) -> None:
        """Forget what came in of an update, and undo what was applied of it."""
        self._watch.stop()
        self._staging.clear()
        if self.weights.applied_version is not None:
            self.weights.undo(reason)
