"""The recipes as users run them: veRL's Hydra knows every key, and what they ask for fits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import verl
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils.config import omega_conf_to_dataclass, validate_config

from fp8rl.correction import IcePop, PPOClip
from fp8rl.integrations.verl.correction import stages_of
from fp8rl.integrations.verl.losses import CORRECTION_KEYS, loss_config
from fp8rl.integrations.verl.settings import SyncSettings, check_rollout

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "verl").glob("*.sh"))


def arguments(recipe: Path, folder: Path, *more: str) -> list[str]:
    """What the script hands to Python."""
    python = folder / "python3"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", str(recipe), *more], env=environment, capture_output=True, text=True, check=True
    )
    module, found = ended.stdout.splitlines()[:2], ended.stdout.splitlines()[2:]
    assert module == ["-m", "verl.trainer.main_ppo"]
    return found


def composed(overrides: list[str]) -> Any:
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return composed(arguments(request.param, tmp_path))


def test_there_is_one_for_each_trainer() -> None:
    assert [path.stem for path in RECIPES] == ["qwen3_30b_a3b_megatron", "qwen3_8b_fsdp"]


def test_veRLs_own_validation_passes(config: Any) -> None:
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert omega_conf_to_dataclass(config.algorithm).rollout_correction is not None


def test_the_rollout_takes_our_updates(config: Any) -> None:
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    check_rollout(rollout)
    kwargs = rollout.checkpoint_engine.engine_kwargs["fp8rl"]
    assert SyncSettings(**kwargs).model_path == config.actor_rollout_ref.model.path


def test_loss_and_correction_are_ours(config: Any) -> None:
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    name = actor.policy_loss.loss_mode
    get_policy_loss_fn(name)
    loss = loss_config(name.removeprefix("fp8rl_"), actor.loss_agg_mode, actor)
    assert (loss.kind, loss.aggregation) in {
        ("ppo_clip", "token-mean"), ("gspo", "seq-mean-token-mean"),
    }  # fmt: skip
    if isinstance(loss, PPOClip):
        assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 3.0)
    keys = config.algorithm.rollout_correction
    stages = stages_of(**{key: keys[key] for key in CORRECTION_KEYS})
    assert [stage.kind for stage in stages] == ["tis", "reject"]
    assert stages[0].level == "token"  # sequence weights of thousands of tokens vanish
    assert config.actor_rollout_ref.rollout.calculate_log_probs


@pytest.mark.parametrize("threshold", ["0.5_5", "0.5_5.0"])
def test_bounds_that_hydra_reads_as_one_number_are_refused(tmp_path: Path, threshold: str) -> None:
    key = "algorithm.rollout_correction.rollout_is_threshold"
    config = composed([*arguments(RECIPES[1], tmp_path), f"{key}={threshold}"])
    found = config.algorithm.rollout_correction.rollout_is_threshold
    if threshold == "0.5_5.0":
        assert stages_of("token", found) == (IcePop(level="token", low=0.5, high=5.0),)
        return
    assert found == 0.55
    with pytest.raises(ValueError, match="with a point"):
        stages_of("token", found)


def test_the_asynchronous_trainer_accepts_its_batches(tmp_path: Path) -> None:
    """Its checks stand before anything is started."""
    config = composed(arguments(RECIPES[0], tmp_path))
    config.trainer.v1.separate_async.parameter_sync_step = 3
    with pytest.raises(AssertionError, match="train_batch_size must equal"):
        PPOTrainerSeparateAsync(config)
    separate = config.trainer.v1.separate_async
    separate.parameter_sync_step = 4
    assert config.data.train_batch_size == 4 * config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend != "naive"


def test_bypass_mode_gets_its_settings_by_veRLs_own_interpolation(tmp_path: Path) -> None:
    config = composed(
        [
            *arguments(RECIPES[1], tmp_path),
            "algorithm.rollout_correction.bypass_mode=True",
            "algorithm.rollout_correction.loss_type=reinforce",
            "actor_rollout_ref.actor.policy_loss.loss_mode=bypass_mode",
            "+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}",
        ]
    )
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    settings = actor.policy_loss.rollout_correction
    stages = stages_of(**{key: settings.get(key) for key in CORRECTION_KEYS})
    assert [stage.kind for stage in stages] == ["tis", "reject"]
    assert settings.get("loss_type") == "reinforce"


def test_arguments_of_the_user_come_last(tmp_path: Path) -> None:
    config = composed(arguments(RECIPES[1], tmp_path, "data.train_batch_size=64"))
    assert config.data.train_batch_size == 64


def test_a_key_that_veRL_does_not_know_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="policy_losses"):
        composed([*arguments(RECIPES[1], tmp_path), "actor_rollout_ref.actor.policy_losses=1"])
