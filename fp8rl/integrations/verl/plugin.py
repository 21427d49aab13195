"""The entry point of the group `verl.plugins`: what of veRL is touched, where, and when.

veRL loads a plugin while it is itself half imported, in every process, and swallows whatever goes
wrong. So nothing of veRL is imported here, and nothing heavy: each place is mended right after veRL
imports the module that has it, where an error is raised to whoever imports.

    verl.trainer.ppo.core_algos             register_policy_loss      fp8rl_*, bypass_mode
    verl.trainer.ppo.rollout_corr_helper    compute_rollout_correction_and_rejection_mask, replaced
    verl.workers.engine.base                BaseEngine.train_batch, wrapped: what losses divide by
    verl.checkpoint_engine.base             CheckpointEngineRegistry  fp8rl
    verl.workers.rollout.base               _ROLLOUT_REGISTRY: the server adapter of vLLM

The second is the one function through which every caller goes, also those that bound another name
of that module when they were imported. It and the third are replaced for everybody in the process,
which the log says once. Where a veRL lacks one of these places that is logged as an error, and what
would have stood there refuses by name when it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from fp8rl.integrations.verl.places import HERE, KNOWN_VERSIONS, version

logger = logging.getLogger(__name__)

# veRL's module -> ours, whose `install(module)` mends it
HOOKS: Final = {
    "verl.trainer.ppo.core_algos": f"{HERE}.losses",
    "verl.trainer.ppo.rollout_corr_helper": f"{HERE}.correction",
    "verl.workers.engine.base": f"{HERE}.denominators",
    "verl.checkpoint_engine.base": f"{HERE}.checkpoint_engine",
    "verl.workers.rollout.base": f"{HERE}.adapters",
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules in `HOOKS` as Python would, and has them mended once they are executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's spec with our loader around its own."""
        if name not in HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Executes a module by its own loader, then mends it."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then the hook, whose errors are the import's."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._own  # whoever reads sources asks it
        self._own.exec_module(module)
        _mend(module)


def _mend(module: ModuleType) -> None:
    importlib.import_module(HOOKS[module.__name__]).install(module)


def install() -> None:
    """Mend what veRL has imported already, and the rest when it comes; again changes nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    if version() not in KNOWN_VERSIONS:
        logger.warning(
            "fp8rl is tested with veRL %s, this is %s", ", ".join(KNOWN_VERSIONS), version()
        )
    for name in HOOKS:
        if name in sys.modules:
            _mend(sys.modules[name])


install()
