"""Expecting a refusal, whether or not annotations are checked at run time."""

import pytest
from jaxtyping import TypeCheckError


def refusal(error: type[Exception], message: str) -> pytest.RaisesExc:
    """The room's own error with `message`; a run-time type checker may be there before it."""
    return pytest.raises((error, TypeCheckError), match=f"{message}|Type-check error")
