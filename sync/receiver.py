"""The engine's side of an update: a vLLM weight-transfer backend that proves what it loaded.

One update is one transaction, run inside each vLLM worker:

    manifest -> fits this model? newer? scales of this version? -> copy each tensor, check its
    digest -> load through vLLM's layerwise reload -> read the engine back, compare -> commit

Everything up to the load is checked before the first byte is applied. Every tensor is owned here
(vLLM keeps references until a layer is complete; the segment is the trainer's). A failure at any
point raises with the tensor's name, and ``failure`` says why until a good update lands; whoever
drives the engine serves nothing while it is set. Prefix-cache reset needs the scheduler and is done
by the engine process after the commit.

Left out: tensor-parallel engines, several segments, deltas.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from fp8rl.quant import KVScaleError
from fp8rl.sync.engine_state import abandon_reload, differences, expected_tensors
from fp8rl.sync.errors import CorruptTensorError, ManifestError, ReadBackError, SegmentError
from fp8rl.sync.manifest import DTYPES, Manifest, TensorRecord, digest, parse_manifest
from fp8rl.sync.segment import Segment

FAILURES_SHOWN = 5
SCALE_SUFFIXES = (".q_scale", ".k_scale", ".v_scale")


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the trainer's segment lies."""

    path: str
    nbytes: int


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One update: its manifest, as JSON values."""

    manifest: dict[str, Any]


@dataclass(frozen=True)
class UpdateReport:
    """What one committed update was, and where its time went (seconds)."""

    version: int
    tensors_proven: int
    kv_scales_proven: int
    seconds: dict[str, float] = field(default_factory=dict)


class ShmReceiver(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Receives FP8 weights and KV scales through shared memory (backend ``fp8rl_shm``)."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        ranks = vllm_config.parallel_config.world_size
        if ranks != 1:
            raise ManifestError(f"fp8rl_shm serves engines of one worker; this one has {ranks}")
        self.expected = {tensor.name: tensor for tensor in expected_tensors(model)}
        self.version: int | None = None
        self.failure: str | None = "no weights have been published yet"
        self.report: UpdateReport | None = None
        self._segment: Segment | None = None
        self._applied: UpdateReport | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Attach the trainer's segment; a new trainer may attach in place of an old one."""
        self.shutdown()
        self._segment = Segment.attach(init_info.path, init_info.nbytes)

    def start_weight_update(self) -> None:
        """Begin: from here on nothing is served until ``finish_weight_update``."""
        self.failure = "an update has begun and was not finished"
        self._applied = None

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Validate, copy, load and prove one update.

        Raises:
            ManifestError, KVScaleError: it does not fit; nothing was applied.
            CorruptTensorError: bytes differ from their digest, NaN or Inf; nothing was applied.
            ReadBackError: the engine does not hold what was sent.
        """
        try:
            self._applied = self._apply(update_info.manifest)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise

    def finish_weight_update(self) -> None:
        """Commit the version that was applied and proven."""
        if self._applied is None:
            raise ManifestError("finish_weight_update came before a complete update")
        self.report, self._applied = self._applied, None
        self.version = self.report.version
        self.failure = None

    def shutdown(self) -> None:
        """Let go of the segment; the weights stay."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _apply(self, raw: dict[str, Any]) -> UpdateReport:
        clock = [time.perf_counter()]
        manifest = parse_manifest(raw)
        self._validate(manifest)
        tensors = self._copy_verified(manifest)
        clock.append(time.perf_counter())
        self._load(tensors)
        clock.append(time.perf_counter())
        problems = differences(self.model, tensors)
        if problems:
            shown = "; ".join(problems[:FAILURES_SHOWN])
            raise ReadBackError(f"{len(problems)} difference(s) after the update: {shown}")
        clock.append(time.perf_counter())
        names = ("copy", "load", "read_back")
        spent = [after - before for before, after in itertools.pairwise(clock)]
        seconds = dict(zip(names, spent, strict=True))
        scales = sum(name.endswith(SCALE_SUFFIXES) for name in tensors)
        return UpdateReport(manifest.version, len(tensors), scales, seconds)

    def _validate(self, manifest: Manifest) -> None:
        """Compare the manifest with this engine's model and version, before anything is read."""
        if self.version is not None and manifest.version <= self.version:
            raise ManifestError(
                f"version {manifest.version} is not newer than {self.version}, which the engine "
                "holds; publish a higher version"
            )
        sent = {record.name: record for record in manifest.tensors}
        missing = [name for name in self.expected if name not in sent]
        extra = [name for name in sent if name not in self.expected]
        wrong = [
            f"{name}: sent {record.dtype} {list(record.shape)}, "
            f"engine takes {self.expected[name].dtype} {list(self.expected[name].shape)}"
            for name, record in sent.items()
            if name in self.expected and not self._fits(record)
        ]
        for what, names in (("missing", missing), ("not of this model", extra), ("unfit", wrong)):
            if names:
                shown = "; ".join(names[:FAILURES_SHOWN])
                raise ManifestError(f"version {manifest.version}: {len(names)} {what}: {shown}")
        self._validate_scales(manifest)

    def _fits(self, record: TensorRecord) -> bool:
        expected = self.expected[record.name]
        return DTYPES[record.dtype] == expected.dtype and record.shape == expected.shape

    def _validate_scales(self, manifest: Manifest) -> None:
        """Check the KV scales' provenance; that each layer has its own is checked by name."""
        measured = manifest.kv_scales
        if measured is None and any(name.endswith(SCALE_SUFFIXES) for name in self.expected):
            raise KVScaleError(f"version {manifest.version}: its KV scales have no provenance")
        if measured is not None and measured.version != manifest.version:
            raise KVScaleError(
                f"KV scales were measured on version {measured.version}, the weights are version "
                f"{manifest.version}; measure them on the weights that are sent"
            )

    def _copy_verified(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Copy every tensor out of the segment and check the copy's digest."""
        if self._segment is None:
            raise SegmentError("no segment is attached; init_weight_transfer_engine comes first")
        tensors = {}
        for record in manifest.tensors:
            raw = self._segment.view(record.offset, record.nbytes).clone()
            if digest(raw) != record.digest:
                raise CorruptTensorError(
                    f"{record.name}: the bytes received are not those sent (SHA-256 differs)"
                )
            tensor = raw.view(DTYPES[record.dtype]).reshape(record.shape)
            if not torch.isfinite(tensor.float()).all():
                raise CorruptTensorError(f"{record.name}: holds NaN or Inf")
            if record.name.endswith(SCALE_SUFFIXES) and not bool(tensor > 0):
                raise KVScaleError(f"{record.name}: is {float(tensor)}, must be above 0")
            tensors[record.name] = tensor
        return tensors

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(iter(tensors.items()))
            finalize_layerwise_reload(self.model, self.model_config)
        except BaseException:
            abandon_reload(self.model)
            raise
