"""Errors of the sync room.

``ValueError``s say that what was sent does not fit; ``RuntimeError``s that the world failed.
After any of them the engine serves nothing until a good update lands.
"""


class ManifestError(ValueError):
    """A manifest is malformed, or does not fit the engine's model or its last version."""


class UnsupportedAttentionError(ValueError):
    """The engine's attention cannot be given KV scales for certain, as it was started."""


class DeltaError(ValueError):
    """A delta is malformed, or was made for a tensor of another size."""


class SourceError(ValueError):
    """A weight source does not yield what the plan or its own metadata announced."""


class SegmentError(RuntimeError):
    """A shared-memory segment cannot be created, attached or is of another size."""


class CorruptTensorError(RuntimeError):
    """The bytes received differ from those that were sent (digest), or hold NaN or Inf."""


class ReadBackError(RuntimeError):
    """After an update the engine does not hold exactly what was sent."""
