"""The engine's side of an update: a vLLM weight-transfer backend that proves what it loaded.

One update is one transaction, run inside each vLLM worker:

    manifest -> may it come in? (``admission.py``) -> copy each tensor, check its digest -> load the
    weights through vLLM's layerwise reload, write the KV scales -> read all back, compare -> commit

The scales may come in a second manifest of the same update, measured in between on the very weights
just applied; until they come the model computes with the scales committed last. Everything up to
the load is checked before the first byte is applied. Every tensor is owned here (vLLM keeps
references until a layer is complete; the segment is the trainer's). A failure at any point raises
with the tensor's name, and ``failure`` says why until a good update lands; whoever drives the
engine serves nothing while it is set. Prefix-cache reset needs the scheduler and is done by the
engine process after the commit.

Left out: tensor-parallel engines, several segments, deltas.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
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

from fp8rl.quant import KVObservation, KVObserver, KVScaleError, KVScales
from fp8rl.sync.admission import admit_scales, admit_weights, copy_verified, shown
from fp8rl.sync.engine_scales import (
    held_scales,
    read_scales,
    refuse_unsupported,
    scale_differences,
    write_scales,
)
from fp8rl.sync.engine_state import abandon_reload, differences, expected_tensors, fit_biases
from fp8rl.sync.errors import ManifestError, ReadBackError, SegmentError
from fp8rl.sync.manifest import Manifest, is_kv_scale, parse_manifest
from fp8rl.sync.segment import Segment

Tensors = dict[str, torch.Tensor]


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Where the trainer's segment lies."""

    path: str
    nbytes: int


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """One manifest of an update, as JSON values."""

    manifest: dict[str, Any]


@dataclass(frozen=True)
class UpdateReport:
    """What one committed update was, and where its time went (seconds)."""

    version: int
    tensors_proven: int
    kv_scales_proven: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class _Update:
    """An update whose weights are applied and proven; ``scales`` is None until they are too."""

    version: int
    weights: int
    scales: Tensors | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    clock: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.clock
        self.clock = now


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
        refuse_unsupported(model, vllm_config.compilation_config)
        self.expected = {tensor.name: tensor for tensor in expected_tensors(model)}
        self.version: int | None = None
        self.report: UpdateReport | None = None
        self._failure: str | None = "no weights have been published yet"
        self._sleep_level: int | None = None
        self._segment: Segment | None = None
        self._update: _Update | None = None
        self._committed: Tensors = {}  # the KV scales
        self._observer: KVObserver | None = None
        self._watch = ExitStack()

    @property
    def failure(self) -> str | None:
        """Why nothing may be served; None where all is well."""
        if self._sleep_level is not None:
            return f"the engine sleeps (level {self._sleep_level}); wake it up"
        return self._failure

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Attach the trainer's segment; a new trainer may attach in place of an old one."""
        self.shutdown()
        self._segment = Segment.attach(init_info.path, init_info.nbytes)

    def start_weight_update(self) -> None:
        """Begin: from here on nothing is served until ``finish_weight_update``."""
        self._failure = "an update has begun and was not finished"
        self._drop_update()

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Validate, copy, apply and prove one manifest.

        Raises:
            ManifestError, KVScaleError: it does not fit; nothing of it was applied.
            CorruptTensorError: bytes differ from their digest, NaN or Inf; likewise.
            ReadBackError: the engine does not hold what was sent.
        """
        try:
            self._update = self._apply(parse_manifest(update_info.manifest))
        except BaseException as error:
            self._drop_update()
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def finish_weight_update(self) -> None:
        """Commit the version that was applied and proven.

        Raises ManifestError where no weights were applied, KVScaleError where scales are missing.
        """
        update = self._update
        if update is None:
            raise ManifestError("finish_weight_update came before a complete update")
        if update.scales is None:
            missing = [name for name in self.expected if is_kv_scale(name)]
            raise KVScaleError(
                f"version {update.version}: its KV scales were to follow and never came: "
                f"{shown(missing)}"
            )
        proven = update.weights + len(update.scales)
        self.report = UpdateReport(update.version, proven, len(update.scales), update.seconds)
        self.version, self._committed = update.version, update.scales
        self._drop_update()
        self._failure = None

    def shutdown(self) -> None:
        """Let go of the segment; the weights stay."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def kv_state(self) -> dict[str, dict[str, list[float]]]:
        """The KV scales that the live model holds: layer -> q, k or v -> its copies.

        The copies are the device scale, the float mirror and, for k and v, the CPU copy.
        """
        return read_scales(self.model)

    def scale_problems(self) -> list[str]:
        """Compare the live model's KV scales with those committed; one line for each that differs.

        Empty where all is well, or nothing was committed yet.
        """
        return scale_differences(self.model, self._committed) if self._committed else []

    def start_observation(self, in_use: bool, histogram: bool) -> None:
        """Have every forward of the model feed an observer, until ``end_observation``.

        Args:
            in_use: count saturation and underflow against the scales that the model holds now:
                those committed last, 1.0 before the first.
            histogram: keep what percentiles need.

        Raises ManifestError unless an update is under way whose weights are applied.
        """
        from fp8rl.sync.qkv_engine import EngineQKV

        if self._update is None:
            raise ManifestError(
                "KV scales are observed on weights that an update has just applied; begin an "
                "update and send its weights first"
            )
        self._watch.close()
        source = EngineQKV(self.model, self.vllm_config)
        held = held_scales(self.model, self.version or 0) if in_use else None
        self._observer = KVObserver(source.shape, histogram=histogram, in_use=held)
        self._watch.enter_context(source.watch(self._observer))

    def end_observation(self) -> dict[str, Any]:
        """Stop observing; returns what was seen, as JSON of a ``KVObservation``."""
        if self._observer is None:
            raise ManifestError("end_observation came before start_observation")
        self._watch.close()
        observer, self._observer = self._observer, None
        return observer.observation().to_json()

    def hold_scales_for(self, seen: dict[str, Any]) -> bool:
        """Compute on under scales that clip nothing of what was observed; False if none does now.

        They are for measuring only: the scales to be published are still awaited. Raises
        KVScaleError where NaN, Inf or only zeros were observed.
        """
        observation = KVObservation.from_json(seen)
        if self._update is None or not bool(observation.saturation().any()):
            return False
        fitting = KVScales.from_amax(
            observation.amax(), version=self._update.version, tokens=observation.tokens
        )
        self._set_scales(fitting.tensors())
        return True

    def slept(self, level: int) -> None:
        """Say that the engine went to sleep; level 2 discards its weights.

        An update that was under way is lost.
        """
        self._sleep_level = level
        self._drop_update()
        if level == 2:
            self._committed = {}
            self._failure = "the engine slept at level 2, which discarded its weights; publish"

    def woke(self) -> None:
        """Say that the engine is awake: write the committed KV scales again and prove them.

        vLLM up to 0.28 sets them to 1.0 when the cache wakes. Raises ReadBackError.
        """
        self._sleep_level = None
        if self._committed:
            try:
                self._set_scales(self._committed)
            except ReadBackError as error:
                self._failure = f"after waking up: {error}"
                raise

    def _drop_update(self) -> None:
        """Forget the update that was under way, and stop observing for it."""
        self._update = None
        self._watch.close()
        self._observer = None

    def _apply(self, manifest: Manifest) -> _Update:
        update = self._update
        if update is None:
            return self._apply_weights(manifest)
        if update.scales is not None:
            raise ManifestError(
                f"version {update.version} is applied already; finish it before sending more"
            )
        admit_scales(manifest, self.expected, awaited=update.version)
        update.clock = time.perf_counter()
        scales = self._read(manifest)
        update.lap("copy")
        self._set_scales(scales)
        update.lap("kv_scales")
        update.scales = scales
        return update

    def _apply_weights(self, manifest: Manifest) -> _Update:
        admit_weights(manifest, self.expected, self.version)
        update = _Update(manifest.version, weights=0)
        tensors = self._read(manifest)
        weights = {n: tensor for n, tensor in tensors.items() if not is_kv_scale(n)}
        update.weights = len(weights)
        update.lap("copy")
        self._load(weights)
        update.lap("load")
        _raise_if_any(differences(self.model, weights))
        update.lap("read_back")
        if manifest.kv_scales == "follow":
            self._set_scales(self._committed or self._ones())
        else:
            update.scales = {n: tensor for n, tensor in tensors.items() if is_kv_scale(n)}
            self._set_scales(update.scales)
        update.lap("kv_scales")
        return update

    def _ones(self) -> Tensors:
        """Scales for measuring the first ones; nothing is ever served under them."""
        return {name: torch.ones(1) for name in self.expected if is_kv_scale(name)}

    def _set_scales(self, scales: Tensors) -> None:
        write_scales(self.model, scales)
        _raise_if_any(scale_differences(self.model, scales))

    def _read(self, manifest: Manifest) -> Tensors:
        if self._segment is None:
            raise SegmentError("no segment is attached; init_weight_transfer_engine comes first")
        return copy_verified(manifest, self._segment)

    def _load(self, weights: Tensors) -> None:
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(iter(weights.items()))
            finalize_layerwise_reload(self.model, self.model_config)
            fit_biases(self.model)
        except BaseException:
            abandon_reload(self.model)
            raise


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise ReadBackError(
            f"{len(problems)} difference(s) after the update: {shown(problems, '; ')}"
        )
