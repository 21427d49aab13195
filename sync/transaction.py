"""The weights of one worker's live model: a version that is proven, and at most one update on it.

    apply    admit -> decode, check -> load the units that changed -> write scales -> read all back
    commit   the update becomes the version held
    undo     load the old bytes of those units, write the old scales, read all back

Nothing is touched before everything that came was checked. ``failure`` says why the model cannot be
served as it is now; None where it holds the committed version, whole. All weights are read back
after each update, those too that it did not touch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fp8rl.sync.admission import admit_scales, admit_weights, shown, unpack
from fp8rl.sync.engine_scales import scale_differences, write_scales
from fp8rl.sync.engine_state import differences, expected_tensors, load, units
from fp8rl.sync.errors import ManifestError, ReadBackError
from fp8rl.sync.manifest import Manifest, is_kv_scale
from fp8rl.sync.mirror import Mirror

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class UpdateReport:
    """What one committed update was, and where its time went (seconds).

    payload_nbytes: what came in. units_loaded: vLLM modules that were loaded anew.
    """

    version: int
    digest: str
    tensors_proven: int
    kv_scales_proven: int
    units_loaded: int
    payload_nbytes: int
    seconds: Mapping[str, float]


@dataclass
class _Update:
    """An update whose weights are applied and proven; ``scales`` is None until they are too."""

    manifest: Manifest
    changed: Tensors
    units: int = 0
    payload_nbytes: int = 0
    scales: Tensors | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    clock: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.clock
        self.clock = now


NOTHING_YET = "no weights have been published yet"


class Transaction:
    """Applies, commits and undoes updates of one model."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model, self._model_config = model, model_config
        self.expected = {tensor.name: tensor for tensor in expected_tensors(model)}
        self._units = units(model)
        self.held: Mirror | None = None
        self.failure: str | None = NOTHING_YET
        self.last_error: str | None = None
        self._update: _Update | None = None

    @property
    def applied_version(self) -> int | None:
        """The version that is applied and waits for its commit."""
        return self._update.manifest.version if self._update is not None else None

    @property
    def unready(self) -> str | None:
        """Why the update cannot be committed as it is; None where it can."""
        if self._update is None:
            return "ManifestError: no complete update was applied; finish comes after a manifest"
        if self._update.scales is None:
            missing = [name for name in self.expected if is_kv_scale(name)]
            return (
                f"KVScaleError: version {self._update.manifest.version}: its KV scales were to "
                f"follow and never came: {shown(missing)}"
            )
        return None

    def apply(self, manifest: Manifest, payload: Tensor) -> None:
        """Apply and prove one manifest, of weights or of the scales that follow them.

        Whoever called undoes it after an error.

        Raises:
            ManifestError, BaseMismatchError, KVScaleError, DeltaError, CorruptTensorError: it does
                not fit, or its bytes are damaged; nothing of it was applied.
            ReadBackError: the engine does not hold what was sent.
        """
        if self._update is None:
            self._apply_weights(manifest, payload)
        else:
            self._apply_scales(self._update, manifest, payload)

    def commit(self, *, keep: bool) -> UpdateReport:
        """Let the update count, and keep its bytes if ``keep``.

        Raises ManifestError where there is none that is complete.
        """
        update, problem = self._update, self.unready
        if update is None or update.scales is None:
            raise ManifestError(f"nothing can be committed: {problem}")
        version = update.manifest.version
        held = Mirror.of(update.manifest, self.held, update.changed, update.scales, keep=keep)
        self.held, self._update = held, None
        self.failure = self.last_error = None
        weights = sum(not is_kv_scale(name) for name in self.expected)
        return UpdateReport(
            version=version,
            digest=held.base.digest,
            tensors_proven=weights + len(update.scales),
            kv_scales_proven=len(update.scales),
            units_loaded=update.units,
            payload_nbytes=update.payload_nbytes,
            seconds=update.seconds,
        )

    def undo(self, reason: str) -> None:
        """Go back to the version held, and remember why; nothing to undo is no error.

        Where its bytes are not kept, or cannot be proven, ``failure`` stays set.
        """
        self.last_error = reason
        update, self._update = self._update, None
        if update is None:
            return
        version = update.manifest.version
        if self.held is None or not self.held.kept:
            self.failure = f"version {version} was not completed: {reason}"
            return
        try:
            self._load(update.changed, self.held.weights)
            self._prove(self.held.weights)
            self._set_scales(self.held.scales)
        except (ValueError, RuntimeError) as error:
            self.failure = (
                f"version {version} was not completed ({reason}), and going back to version "
                f"{self.held.base.version} failed: {type(error).__name__}: {error}"
            )
            return
        self.failure = None

    def discard(self, reason: str) -> None:
        """Count the weights as lost: the model no longer holds them."""
        self._update = None
        self.failure = reason
        if self.held is not None:
            self.held = Mirror(self.held.base, self.held.digests, {})

    def forget(self) -> None:
        """Hold no version any more: the next may have any number, and none is served before it."""
        self._update = self.held = self.last_error = None
        self.failure = NOTHING_YET

    def hold_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Write and prove scales for measuring; those of the update are still awaited."""
        self._set_scales(scales)

    def restore_scales(self) -> None:
        """Write the committed scales again and prove them, as after waking up."""
        if self.held is None or not self.held.scales:
            return
        try:
            self._set_scales(self.held.scales)
        except ReadBackError as error:
            self.failure = f"after waking up: {error}"
            raise

    def _apply_weights(self, manifest: Manifest, payload: Tensor) -> None:
        began = time.perf_counter()
        admit_weights(manifest, self.expected, self.held)
        tensors = unpack(manifest, payload, self.held)
        changed = {name: tensor for name, tensor in tensors.items() if not is_kv_scale(name)}
        update = _Update(manifest, changed, payload_nbytes=len(payload), clock=began)
        update.lap("verify")
        self._update = update
        self.failure = f"version {manifest.version} was applied and not committed"
        older = self.held.weights if manifest.base and self.held else {}
        weights = {**older, **changed}
        update.units = self._load(changed, weights)
        update.lap("load")
        self._prove(weights)
        update.lap("read_back")
        if manifest.kv_scales == "follow":
            self._set_scales(self._scales_for_measuring())
        else:
            scales = {name: tensor for name, tensor in tensors.items() if is_kv_scale(name)}
            self._set_scales(scales)
            update.scales = scales
        update.lap("kv_scales")

    def _apply_scales(self, update: _Update, manifest: Manifest, payload: Tensor) -> None:
        if update.scales is not None:
            raise ManifestError(
                f"version {update.manifest.version} is applied already; finish it before sending "
                "more"
            )
        admit_scales(manifest, self.expected, awaited=update.manifest.version)
        update.clock = time.perf_counter()
        scales = unpack(manifest, payload, None)
        update.lap("verify")
        self._set_scales(scales)
        update.lap("kv_scales")
        update.scales = scales
        update.payload_nbytes += len(payload)

    def _load(self, changed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int:
        """Load every unit of which a tensor changed; returns how many."""
        touched = [names for names in self._units.values() if not changed.keys().isdisjoint(names)]
        load(self._model, self._model_config, {n: weights[n] for names in touched for n in names})
        return len(touched)

    def _prove(self, weights: Mapping[str, Tensor]) -> None:
        _raise_if_any(differences(self._model, weights))

    def _set_scales(self, scales: Mapping[str, Tensor]) -> None:
        write_scales(self._model, scales)
        _raise_if_any(scale_differences(self._model, scales))

    def _scales_for_measuring(self) -> Mapping[str, Tensor]:
        """Those committed last, or ones; nothing is ever served under the latter."""
        if self.held is not None and self.held.scales:
            return self.held.scales
        return {name: Tensor([1.0]) for name in self.expected if is_kv_scale(name)}


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise ReadBackError(
            f"{len(problems)} difference(s) after the update: {shown(problems, '; ')}"
        )
