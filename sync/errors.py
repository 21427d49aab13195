"""Errors of the sync room.

``ValueError``s say that what was sent does not fit; ``RuntimeError``s that the world failed.
After any of them the engine holds the version that it proved last, or serves nothing.
"""


class ManifestError(ValueError):
    """A manifest is malformed, or does not fit the engine's model or its last version."""


class BaseMismatchError(ValueError):
    """A delta builds on a version that the engine does not hold; it needs a full update."""


class NotIntroducedError(ValueError):
    """The engine knows no publisher, as after a restart; it needs to be introduced again."""


class PublisherError(ValueError):
    """The engine takes its updates from another publisher."""


class EngineCallError(RuntimeError):
    """A vLLM engine refused a call, or could not be reached; its answer is in the text."""


class EnginesError(RuntimeError):
    """No engine took an update; what each of several answered."""


class UpdateRefusedError(ValueError):
    """An engine refused an update; the text has the error of its worker, by name."""


class UnsupportedAttentionError(ValueError):
    """The engine's attention cannot be given KV scales for certain, as it was started."""


class UnsupportedKernelError(ValueError):
    """The engine's FP8 kernels cannot compute what it was started for."""


class RoutingError(ValueError):
    """The routers of a model do not show which experts they choose, or not of every token."""


class StreamError(ValueError):
    """A model does not show its residual stream, or not of every token."""


class DeltaError(ValueError):
    """A delta is malformed, or was made for a tensor of another size."""


class SourceError(ValueError):
    """A weight source does not yield what the plan or its own metadata announced."""


class SegmentError(RuntimeError):
    """A shared-memory segment cannot be created, attached or is of another size."""


class TransportError(RuntimeError):
    """Bytes of an update could not be sent, or did not arrive."""


class CorruptTensorError(RuntimeError):
    """The bytes received differ from those that were sent (digest), or hold NaN or Inf."""


class ReadBackError(RuntimeError):
    """After an update the engine does not hold exactly what was sent."""
