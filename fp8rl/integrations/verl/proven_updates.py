"""The vLLM worker's side of an update that veRL carried: taken in, checked, loaded, proven.

    begin -> take(name, bytes) for every tensor that veRL brings -> finish

What an update must be, and how it is proven, is `fp8rl.sync`'s: `Staging` collects the payload in
host memory, `Transaction` admits the manifest, loads what came, writes the KV scales and reads all
of it back. What goes wrong is raised in the worker when all has come, which ends veRL's run. This
file needs vLLM and no veRL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from jaxtyping import UInt8
from torch import Tensor

from fp8rl.integrations.verl.wire import MANIFEST, STAGE, manifest_of
from fp8rl.sync import ManifestError
from fp8rl.sync.engine_scales import refuse_unsupported
from fp8rl.sync.manifest import Manifest, parse_manifest
from fp8rl.sync.staging import Staging
from fp8rl.sync.transaction import Transaction, UpdateReport
from fp8rl.sync.transport import Stage, parse_stage

# what bytes that are not ours, or a fault of ours, may raise while they are taken in
REFUSALS: Final = (ValueError, RuntimeError, AssertionError, LookupError, TypeError, AttributeError)


class Updates:
    """The updates of one worker's model."""

    def __init__(self, model: Any, vllm_config: Any) -> None:
        """Raises UnsupportedAttentionError where KV scales could not be set for certain."""
        refuse_unsupported(model, vllm_config.compilation_config)
        self._vllm_config = vllm_config
        self._weights = Transaction(model, vllm_config.model_config)
        self._staging = Staging(self._weights.expected.values())
        self._manifest: Manifest | None = None
        self._refusal: Exception | None = None
        self._committed: UpdateReport | None = None

    def begin(self) -> None:
        """Begin; what came of an earlier one, or was applied of it, counts no longer."""
        self._weights.undo("a new update began before it was finished")
        self._staging.clear()
        self._manifest = self._refusal = None

    def take(self, messages: Iterable[tuple[str, Tensor]]) -> None:
        """Take in what one bucket holds; its memory may change afterwards.

        Never raises: veRL's sender waits for an answer to each bucket, without which it would wait
        for ever. What is wrong is kept for `finish`.
        """
        for name, data in messages:
            if self._refusal is not None:
                return
            try:
                self._take(name, data)
            except REFUSALS as error:
                self._refusal = error

    def finish(self) -> None:
        """Apply what came, prove it and commit it.

        Raises:
            ManifestError: something else came than stages, in order, and a manifest; or as below.
            BaseMismatchError, KVScaleError, CorruptTensorError, ReadBackError, and whatever a
                loader of vLLM raises: as `Transaction.apply`.
        """
        from vllm.config import set_current_vllm_config

        if self._refusal is not None:
            raise self._refusal
        if self._manifest is None:
            raise ManifestError("an update ended without a manifest")
        payload = self._staging.take(self._manifest.payload_nbytes)
        with set_current_vllm_config(self._vllm_config):  # as vLLM's own updates do
            self._weights.apply(self._manifest, payload)
        self._committed = self._weights.commit(keep=False)

    def _take(self, name: str, data: Tensor) -> None:
        if name.startswith(STAGE):
            stage = parse_stage(_json(name.removeprefix(STAGE)))
            self._staging.receive(stage, _Brought(data))
        elif name == MANIFEST:
            self._manifest = parse_manifest(manifest_of(data))
        else:
            raise ManifestError(
                f"{name}: came in an update, which consists of stages and a manifest; is "
                "checkpoint_engine.backend=fp8rl set for the trainer too?"
            )

    def report(self) -> dict[str, Any]:
        """What this worker holds, as JSON values."""
        last = self._committed
        return {
            "version": last.version if last else None,
            "digest": last.digest if last else None,
            "tensors_proven": last.tensors_proven if last else 0,
            "kv_scales_proven": last.kv_scales_proven if last else 0,
            "failure": self._weights.failure,
        }


class ProvenUpdates:
    """Mixed into vLLM's worker class by vLLM; see `worker_extension.py` for veRL's part."""

    model_runner: Any
    vllm_config: Any
    _fp8rl_updates: Updates | None = None

    def fp8rl_updates(self) -> Updates:
        """The updates of this worker's model."""
        if self._fp8rl_updates is None:
            self._fp8rl_updates = Updates(self.model_runner.model, self.vllm_config)
        return self._fp8rl_updates

    def fp8rl_report(self) -> dict[str, Any]:
        """What this worker holds."""
        return self.fp8rl_updates().report()


class _Brought:
    """An inbox of one stage, whose bytes are here."""

    def __init__(self, data: UInt8[Tensor, " n"]) -> None:
        self._data = data

    def fetch(self, stage: Stage, out: UInt8[Tensor, " n"]) -> None:
        """Copy them; ManifestError where there are not as many as the stage says."""
        if len(self._data) != len(out):
            raise ManifestError(
                f"a stage of {stage.nbytes} bytes came with {len(self._data)} bytes"
            )
        out.copy_(self._data)

    def close(self) -> None:
        """Nothing is held."""


def _json(text: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"a stage's place cannot be read: {text[:80]!r}") from error
    return found
