"""What is said where a veRL lacks a place through which fp8rl works.

Importing this installs nothing: `plugin.py` does, which names the places.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

KNOWN_VERSIONS: Final = ("0.9.1",)
HERE: Final = "fp8rl.integrations.verl"


class VeRLVersionError(RuntimeError):
    """This veRL lacks a place that fp8rl needs; names the place and the versions."""


def missing(place: str) -> VeRLVersionError:
    """Log as an error that a place is missing, and return the error for whoever needs it."""
    error = VeRLVersionError(
        f"veRL {version()} has no {place}, through which fp8rl works; known to have it: "
        f"{', '.join(KNOWN_VERSIONS)}. Install one of these, or set VERL_USE_EXTERNAL_PLUGINS=none"
    )
    logger.error("%s", error)
    return error


def refusing(error: VeRLVersionError) -> Callable[..., object]:
    """Return a function that raises `error` when it is called, with anything."""

    def refuse(*_: object, **__: object) -> object:
        raise error

    return refuse


def version() -> str:
    """veRL's, which it knows before it loads plugins."""
    return str(getattr(sys.modules.get("verl"), "__version__", "unknown"))
