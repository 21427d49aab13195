"""The configuration of a study: seeds, what all runs share, and the arms.

    seeds: 5
    run: {steps: 60, trainer: {learning_rate: 1.0e-3}}     keys of a run's configuration
    arms:
      bf16: {title: BF16, changes: {rollout.precision: bf16}}
      fp8: {title: FP8, against: bf16, changes: {rollout.precision: fp8}}

An arm is the shared run with a few keys changed, and is held against another arm, its baseline. The
study gives every run its seed, its folder and its start.
"""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic import model_validator as check

from fp8rl.config.file import load, parse, set_key
from fp8rl.config.model import Frozen
from fp8rl.config.run import RunConfig
from fp8rl.errors import ConfigError
from fp8rl.report.equivalence import MARGIN

OURS = ("seed", "run_dir", "warmup.start_from")  # keys that the study sets for each run
ARM_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class ArmConfig(Frozen):
    """One arm: what it is called, held against, and what it changes in the shared run."""

    title: str = Field(min_length=1, description="what the arm is, in a few words")
    against: str | None = Field(None, description="the arm it is compared with; null: a baseline")
    judged: bool = Field(
        True, description="whether its reward is; false where its runs are too short to learn"
    )
    group: str = Field("arms", min_length=1, description="arms of a group are drawn together")
    changes: dict[str, Any] = Field({}, description="dotted key of a run -> its value in this arm")


class StudyConfig(Frozen):
    """A study, whole."""

    seeds: PositiveInt = Field(5, description="runs of each arm, with seeds 0, 1, ...")
    margin: PositiveFloat = Field(
        MARGIN, description="differences of held-out reward within +- this are none that matter"
    )
    last_evaluations: PositiveInt = Field(
        3, description="held-out evaluations at the end of a run whose mean is its reward"
    )
    run: dict[str, Any] = Field({}, description="keys of a run's configuration, for all arms")
    arms: dict[str, ArmConfig] = Field(min_length=1, description="name -> arm, in their order")

    @check(mode="after")
    def _arms_fit(self) -> Self:
        for name, arm in self.arms.items():
            if not ARM_NAME.fullmatch(name):
                raise ValueError(
                    f"arm {name!r}: a name is a folder's: small letters, digits, '.' and '-'"
                )
            if arm.against is not None and (arm.against not in self.arms or arm.against == name):
                raise ValueError(
                    f"arms.{name}.against is {arm.against!r}, expected another arm: "
                    f"{', '.join(other for other in self.arms if other != name)}"
                )
        return self

    def run_config(self, arm: str, *, origin: str = "study") -> RunConfig:
        """The configuration of an arm's runs, but for what the study sets for each.

        Raises:
            ConfigError: naming the arm, and each key that is unknown, out of range or the study's.
        """
        raw = deepcopy(self.run)
        for key, value in self.arms[arm].changes.items():
            set_key(raw, key, deepcopy(value))
        for key in OURS:
            section, _, leaf = key.rpartition(".")
            if leaf in (raw.get(section) or {} if section else raw):
                raise ConfigError(
                    f"{origin}: arms.{arm}: {key} is set by the study itself; leave it out"
                )
        return parse(RunConfig, raw, origin=f"{origin}: arms.{arm}")


def load_study(path: Path, overrides: list[str]) -> StudyConfig:
    """Read a study's YAML file, apply ``a.b=c`` overrides, validate it and every arm.

    Raises:
        ConfigError: see ``config/file.py``; the message names the arm.
    """
    study = load(StudyConfig, path, overrides)
    parse(RunConfig, deepcopy(study.run), origin=f"{path}: run")
    for arm in study.arms:
        config = study.run_config(arm, origin=str(path))
        if config.world_size > 1:
            raise ConfigError(
                f"{path}: arms.{arm}: a study's runs have one trainer rank; leave out "
                "trainer.tensor_parallel and trainer.pipeline_parallel"
            )
    return study
