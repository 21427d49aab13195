"""The plugin is found by veRL itself, costs nothing until it is needed, and is never silent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAD = "import logging, sys; logging.basicConfig(level=logging.WARNING)\n"


def ran(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, which must end well."""
    import os

    ended = subprocess.run(
        [sys.executable, "-c", HEAD + program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def test_import_verl_finds_the_plugin_and_loads_nothing_else_of_ours() -> None:
    ended = ran(
        "import verl\n"
        "assert 'fp8rl.integrations.verl.plugin' in sys.modules\n"
        "assert not {'fp8rl.correction', 'fp8rl.quant', 'fp8rl.sync'} & set(sys.modules)\n"
        "assert 'verl.trainer.ppo.core_algos' not in sys.modules\n"
    )
    assert ended.returncode == 0


def test_every_place_is_mended_as_veRL_imports_it() -> None:
    ended = ran(
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "import verl.trainer.ppo.rollout_corr_helper as helper\n"
        "from verl.workers.engine.base import BaseEngine\n"
        "from verl.checkpoint_engine import CheckpointEngineRegistry\n"
        "from verl.workers.rollout import base\n"
        "import fp8rl.integrations.verl.losses as losses\n"
        "for kind in losses.KINDS: get_policy_loss_fn(f'fp8rl_{kind}')\n"
        "assert get_policy_loss_fn('bypass_mode') is losses.bypass_loss\n"
        "ours = helper.compute_rollout_correction_and_rejection_mask\n"
        "assert ours.__module__ == 'fp8rl.integrations.verl.correction'\n"
        "assert BaseEngine.train_batch.__wrapped__\n"
        "assert CheckpointEngineRegistry.get('fp8rl').__name__ == 'FP8CheckpointEngine'\n"
        "assert 'fp8rl' in base._ROLLOUT_REGISTRY['vllm', 'async']\n"
    )
    assert ended.returncode == 0


def test_a_plugin_that_comes_late_mends_what_is_there_and_what_was_bound() -> None:
    ended = ran(
        "from verl.trainer.ppo.rollout_corr_helper import (\n"
        "    compute_rollout_correction_and_add_to_batch as bound)\n"
        "import verl.trainer.ppo.core_algos as algos\n"
        "assert 'fp8rl_gspo' not in algos.POLICY_LOSS_REGISTRY\n"
        "import fp8rl.integrations.verl.plugin\n"
        "assert 'fp8rl_gspo' in algos.POLICY_LOSS_REGISTRY\n"
        "used = bound.__globals__['compute_rollout_correction_and_rejection_mask']\n"
        "assert used.__module__ == 'fp8rl.integrations.verl.correction'\n",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert ended.returncode == 0


def test_a_veRL_that_is_not_known_is_said_in_the_log() -> None:
    ended = ran(
        "import types\n"
        "sys.modules['verl'] = types.SimpleNamespace(__version__='0.12.0')\n"
        "import fp8rl.integrations.verl.plugin\n"
    )
    assert "tested with veRL 0.9.1, this is 0.12.0" in ended.stderr


def test_none_leaves_veRL_as_it_is() -> None:
    ended = ran(
        "import verl.trainer.ppo.core_algos as algos\n"
        "assert not [name for name in algos.POLICY_LOSS_REGISTRY if 'fp8rl' in name]\n"
        "assert not [name for name in sys.modules if name.startswith('fp8rl')]\n",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert ended.returncode == 0


def test_none_leaves_veRL_as_it_is_whatever_of_ours_is_imported() -> None:
    ended = ran(
        "import verl.trainer.ppo.core_algos as algos\n"
        "from fp8rl.integrations.verl import (\n"
        "    adapters, checkpoint_engine, correction, denominators, losses, settings, wire)\n"
        "assert 'fp8rl.integrations.verl.plugin' not in sys.modules\n"
        "assert not [name for name in algos.POLICY_LOSS_REGISTRY if 'fp8rl' in name]\n",
        VERL_USE_EXTERNAL_PLUGINS="none",
    )
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("module", "place", "told"),
    [
        ("trainer/ppo/core_algos.py", "POLICY_LOSS_REGISTRY", "core_algos.POLICY_LOSS_REGISTRY"),
        (
            "trainer/ppo/rollout_corr_helper.py",
            "compute_rollout_correction_and_rejection_mask",
            "rollout_corr_helper.compute_rollout_correction_and_rejection_mask",
        ),
        ("workers/engine/base.py", "BaseEngine", "BaseEngine.train_batch"),
        ("checkpoint_engine/base.py", "CheckpointEngineRegistry", "CheckpointEngineRegistry"),
        ("workers/rollout/base.py", "_ROLLOUT_REGISTRY", "_ROLLOUT_REGISTRY"),
    ],
)
def test_a_veRL_without_a_place_is_an_error_in_the_log(module: str, place: str, told: str) -> None:
    name = "verl." + module.removesuffix(".py").replace("/", ".")
    ended = ran(
        "import types, importlib, verl\n"
        "from fp8rl.integrations.verl.plugin import HOOKS\n"
        f"importlib.import_module(HOOKS[{name!r}]).install(types.ModuleType({name!r}))\n"
    )
    assert "ERROR" in ended.stderr and told in ended.stderr
    assert "veRL 0.9.1 has no" in ended.stderr and "known to have it: 0.9.1" in ended.stderr


def test_a_bypass_mode_that_veRL_has_not_refuses_by_name() -> None:
    ended = ran(
        "import types, pytest, verl\n"
        "from fp8rl.integrations.verl import losses, places\n"
        "algos = types.ModuleType('verl.trainer.ppo.core_algos')\n"
        "algos.POLICY_LOSS_REGISTRY = {}\n"
        "losses.install(algos)\n"
        "with pytest.raises(places.VeRLVersionError, match='bypass_mode.*0.9.1'):\n"
        "    algos.POLICY_LOSS_REGISTRY['bypass_mode'](old_log_prob=None)\n"
    )
    assert ended.returncode == 0


def test_an_error_in_a_hook_is_that_of_the_import(tmp_path: Path) -> None:
    ended = ran(
        "import verl, pytest\n"
        "import fp8rl.integrations.verl.plugin as plugin\n"
        "plugin.HOOKS['verl.trainer.ppo.core_algos'] = 'no_such_module'\n"
        "with pytest.raises(ModuleNotFoundError, match='no_such_module'):\n"
        "    import verl.trainer.ppo.core_algos\n"
    )
    assert ended.returncode == 0
