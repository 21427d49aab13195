"""Errors of the front door: what the caller can mend, and what the world did.

``ConfigError`` ends the command line with exit code 2 before anything heavy starts;
the others end it with exit code 1.
"""


class ConfigError(ValueError):
    """A configuration, an override or the machine does not allow this run."""


class RunDirError(ValueError):
    """A run folder cannot be used: it exists, is not one, or is broken."""


class EngineError(RuntimeError):
    """The rollout engine refused or failed a request; the message is the engine's own."""


class EngineDiedError(EngineError):
    """The rollout engine's process ended; the message carries its log's last lines."""


class StaleWeightsError(EngineError):
    """The engine holds no proven weights of the version that was asked for."""


class CheckpointError(RunDirError):
    """A checkpoint is broken, or belongs to another number of ranks."""


class BatchError(ValueError):
    """A token batch does not have the shapes, dtypes or marks that training needs."""


class TrainerError(RuntimeError):
    """The trainer cannot start, or a step went wrong; the weights are those before it."""


class NonFiniteGradientError(TrainerError):
    """The gradient's norm is NaN or Inf; the step was not taken."""


class StudyError(RuntimeError):
    """A study cannot go on: what several of its runs need could not be made."""
