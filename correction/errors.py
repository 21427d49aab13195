"""What this room refuses. Every error is a ValueError: the caller can mend its input."""


class CorrectionError(ValueError):
    """Base of this room's errors; the message names the tensor, what was found and expected."""


class ShapeError(CorrectionError):
    """A tensor's shape or dtype does not fit the others'."""


class MaskError(CorrectionError):
    """A mask is not boolean, not [batch, tokens], or selects nothing where something is needed."""


class LogProbError(CorrectionError):
    """An unmasked log-probability is NaN, infinite or positive."""


class ValueRangeError(CorrectionError):
    """Unmasked advantages, weights, rewards or a denominator are not usable numbers."""
