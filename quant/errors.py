"""What can go wrong in fp8rl.quant, by name.

Mistakes and measurements that the caller can mend derive from ValueError, what the world did (a
package that is missing, a disk that fails) from RuntimeError. Messages name the tensor or layer,
what was found, what was expected and what to do.
"""


class QuantFormatError(ValueError):
    """A tensor, block size or scale format that this room does not define."""


class NonFiniteError(ValueError):
    """A tensor to be quantized holds NaN or Inf.

    Attributes: `name` of the tensor, `count` of non-finite elements, `first_index` of the first one
    in row-major order, which was `found`.
    """

    def __init__(self, name: str, count: int, first_index: tuple[int, ...], found: float) -> None:
        self.name = name
        self.count = count
        self.first_index = first_index
        self.found = found
        super().__init__(
            f"{name}: {count} non-finite element(s), the first at index {list(first_index)} "
            f"({found}); FP8 E4M3 needs finite input, so nothing was quantized. "
            "Look for the step that made it (loss scale, learning rate, a bad gradient)."
        )

    def __reduce__(self) -> tuple[object, ...]:
        """What another process makes it of: an exception's own way keeps only the message."""
        return type(self), (self.name, self.count, self.first_index, self.found)


class NonFiniteWeightError(NonFiniteError):
    """A weight to be quantized holds NaN or Inf."""


class NonFiniteActivationError(NonFiniteError):
    """An activation to be quantized holds NaN or Inf."""


class ShardError(ValueError):
    """Parts of a weight do not fit together, or the ranks that hold them do not agree."""


class QuantPlanError(ValueError):
    """The model, a tensor name or a request cannot be placed in a quantization plan."""


class FakeQuantError(ValueError):
    """A linear cannot be fake-quantized to the published bytes, or changed while it was."""


class TransformerEngineError(RuntimeError):
    """Transformer Engine is missing, or set up for other scales than those asked for."""


class KVScaleError(ValueError):
    """KV-cache scales cannot be made from what was observed, or are incomplete."""


class NonFiniteKVError(KVScaleError):
    """NaN or Inf was observed in q, k or v."""


class RankLostError(RuntimeError):
    """Another rank ended, or fell silent, while the ranks joined what they observed."""


class CheckpointFormatError(ValueError):
    """A checkpoint file or folder is missing, truncated, corrupt or not of the expected kind."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted as asked: options, destination or room do not allow it."""


class CheckpointWriteError(RuntimeError):
    """The destination could not be written; what is complete stays for the next run."""
