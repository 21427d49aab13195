"""The server adapters that veRL gives its rollouts, so that `backend=fp8rl` is never overlooked.

veRL looks its adapters up by rollout name in `_ROLLOUT_REGISTRY`, a table of import paths. vLLM's
becomes ours (`server_adapter.py`), which is veRL's where another backend is configured. Those of
other rollouts would send BF16 without a word, since veRL's synchronous trainer never asks its
checkpoint engine; they become themselves with one question at the start. That table is private to
veRL; where it is not as known, `plugin.py` says so.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from fp8rl.integrations.verl.places import HERE, missing
from fp8rl.integrations.verl.settings import BACKEND, check_rollout

_others: dict[str, str] = {}  # rollout -> path of veRL's adapter


def install(base: ModuleType) -> None:
    """Put our paths into veRL's table."""
    table = getattr(base, "_ROLLOUT_REGISTRY", None)
    if table is None or ("vllm", "async") not in table:
        missing(f"{base.__name__}._ROLLOUT_REGISTRY['vllm', 'async']")
        return
    for rollout, mode in table:
        if (rollout, mode) == ("vllm", "async"):
            table[rollout, mode] = f"{HERE}.server_adapter.ServerAdapter"
        elif not table[rollout, mode].startswith(HERE):
            _others[f"{rollout}_{mode}"] = table[rollout, mode]
            table[rollout, mode] = f"{__name__}.{rollout}_{mode}"


def __getattr__(name: str) -> Any:
    """Make the adapter of another rollout when veRL asks for it."""
    if name not in _others:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, cls = _others[name].rpartition(".")
    return _asking(getattr(importlib.import_module(module), cls))


def _asking(adapter: type[Any]) -> type[Any]:
    """A subclass that refuses a config which it cannot serve."""

    class Asking(adapter):
        def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
            if config is not None and config.checkpoint_engine.backend == BACKEND:
                check_rollout(config)
            super().__init__(*args, config=config, **kwargs)

    Asking.__name__ = Asking.__qualname__ = adapter.__name__
    return Asking
