"""Several runs side by side: which are seeds of one arm, what is compared, and with what.

Runs whose configurations differ in nothing but ``seed``, ``run_dir`` and ``warmup.start_from``
(a study begins every seed at a start of its own) are one arm; a key that an older run has not is
taken at its default, since that is how the older version behaved. The baseline is the first arm
whose rollouts are BF16, else the first one given. Differences are paired by the seeds that both
arms have; where they have none in common, they are of the arms' means over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8rl.config.run import RunConfig
from fp8rl.errors import RunDirError
from fp8rl.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from fp8rl.report.data import RunData
from fp8rl.report.words import SHORT_ARMS

BASELINE_COLOUR = "#000000"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
OF_THE_RUN = ("seed", "run_dir", "warmup.start_from")  # in which the runs of an arm differ
MACHINE = ("cpu.model", "cpu.cores", "gpus")
PRECISION = "rollout.precision"
NAMED_KEYS, LONGEST_VALUE = 2, 20  # in the name of an arm


@dataclass(frozen=True)
class Arm:
    """Runs of one configuration, one for each seed."""

    name: str
    colour: str
    runs: tuple[RunData, ...]

    def values(self, of: Callable[[RunData], float | None]) -> dict[int, float]:
        """A number of each run by its seed; runs that did not measure it are left out."""
        pairs = {int(run.config["seed"]): of(run) for run in self.runs}
        return {seed: value for seed, value in pairs.items() if value is not None}

    def called(self, run: RunData) -> str:
        """One of its runs, for people: folders of several arms may have the same name."""
        return f"{self.name}, seed {run.config['seed']}"

    @property
    def fp8(self) -> bool:
        """Whether anything in its rollouts is FP8."""
        return self.runs[0].precision != "bf16"


@dataclass(frozen=True)
class Comparison:
    """Arms in the order given, and the one that the others are held against."""

    arms: tuple[Arm, ...]
    baseline: Arm

    @property
    def runs(self) -> list[RunData]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def others(self) -> tuple[Arm, ...]:
        """The arms but for the baseline."""
        return tuple(arm for arm in self.arms if arm is not self.baseline)


def compare(runs: Sequence[RunData]) -> Comparison:
    """Sort runs into arms.

    Raises:
        RunDirError: the runs were given other tasks, or two are of one configuration and seed.
    """
    _one_task(runs)
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        key = json.dumps(_of_the_arm(run.config), sort_keys=True)
        for other in groups.setdefault(key, []):
            if other.config["seed"] == run.config["seed"]:
                raise RunDirError(
                    f"{other.path} and {run.path} have, run_dir and warmup.start_from aside, the "
                    f"same configuration and seed {run.config['seed']}; give one of them"
                )
        groups[key].append(run)
    found = list(groups.values())
    first = next((i for i, group in enumerate(found) if group[0].precision == "bf16"), 0)
    colours = iter(COLOURS * len(found))
    arms = [
        Arm(name, BASELINE_COLOUR if place == first else next(colours), tuple(group))
        for place, (name, group) in enumerate(zip(_names(found, first), found, strict=True))
    ]
    return Comparison(tuple(arms), arms[first])


def differences(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, list[str]]:
    """The dotted keys in which nested mappings differ, with each one's value as text."""
    flat = [dict(_flat(part)) if part else {} for part in parts]
    keys = dict.fromkeys(key for part in flat for key in part)
    rows = {key: [_text(part.get(key)) for part in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def configuration_differences(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """The keys of the configuration in which arms differ."""
    return differences([_of_the_arm(arm.runs[0].config) for arm in arms])


def other_machines(runs: Sequence[RunData]) -> list[str]:
    """The facts in which the machines differ that the runs were made on, where they are known."""
    known = [run.environment for run in runs if run.environment]
    return [key for key in differences(known) if key in MACHINE]


def _one_task(runs: Sequence[RunData]) -> None:
    first = runs[0]
    for run in runs[1:]:
        one, other = first.config["task"], run.config["task"]
        differing = [key for key in one if key in other and one[key] != other[key]]
        if differing:
            found = "; ".join(f"task.{k}: {one[k]} and {other[k]}" for k in differing)
            raise RunDirError(
                f"{first.path} and {run.path} learn different tasks, so that their rewards "
                f"cannot be compared ({found}); give runs of one task"
            )


def _of_the_arm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what is each run's own, with defaults for keys it has not."""
    whole = _filled(config, RunConfig().model_dump(mode="json"))
    return _without(whole, OF_THE_RUN)


def _without(
    section: Mapping[str, Any], dropped: Sequence[str], prefix: str = ""
) -> dict[str, Any]:
    """A configuration but for these dotted keys."""
    return {
        key: _without(value, dropped, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in section.items()
        if f"{prefix}{key}" not in dropped
    }


def _filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        key: _filled(value, defaults[key])
        for key, value in config.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**defaults, **config, **inner}


def _names(groups: Sequence[Sequence[RunData]], baseline: int) -> list[str]:
    """What ran in FP8, and the keys in which an arm differs from the baseline, as overrides."""
    configs = [_of_the_arm(group[0].config) for group in groups]
    names = []
    for config, group in zip(configs, groups, strict=True):
        rows = differences([config, configs[baseline]])
        shown = [f"{key}={_cut(row[0])}" for key, row in rows.items() if key != PRECISION]
        more = ["..."] if len(shown) > NAMED_KEYS else []
        names.append(", ".join([SHORT_ARMS[group[0].precision], *shown[:NAMED_KEYS], *more]))
    return [
        name if names.count(name) == 1 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else "..."


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", part


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)
