"""What an engine worker holds, byte for byte, in host memory: the base of deltas and of rollback.

The mirror is the last committed version under checkpoint names, as it was received. Its tensors are
never written to: an update makes new ones, and the commit exchanges them. It costs one byte for
each FP8 weight in every worker; without it the engine takes full updates only, and one that fails
while it is applied leaves nothing to serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fp8rl.sync.manifest import Base, Manifest, state_digest


@dataclass(frozen=True)
class Mirror:
    """One proven version: its weights' fingerprints, its weights if kept, its KV scales."""

    base: Base
    digests: Mapping[str, str]
    weights: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        before: Mirror | None,
        changed: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        *,
        keep: bool,
    ) -> Mirror:
        """Return the version of a manifest: ``changed`` weights over those of the one before."""
        base = Base(version=manifest.version, digest=state_digest(manifest.tensors))
        digests = {record.name: record.digest for record in manifest.tensors}
        older = before.weights if before is not None else {}
        return cls(base, digests, {**older, **changed} if keep else {}, scales)

    @property
    def kept(self) -> bool:
        """Whether the weights' bytes are here."""
        return bool(self.weights)
