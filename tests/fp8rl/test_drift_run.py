"""A run that is probed at every step: quiet where all is well, and what it does about a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8rl.calibration import Calibration
from fp8rl.config.file import dump_config, parse_config
from fp8rl.config.run import RunConfig
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.loop import train
from fp8rl.quant import KVCalibrator, KVScales
from fp8rl.sync.streams import StreamObservation
from tests.fp8rl.run_helpers import TINY, Command, metrics

LAYER = 1
pytestmark = pytest.mark.slow


class Damaged(RolloutEngine):
    """An engine in which a weight changes after the proof, before the probes of two versions."""

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        super().__init__(settings, folder, module="tests.fp8rl.drift_worker")

    def observe_streams(self, prompts: Any, *, version: int, routes: bool) -> StreamObservation:
        if version in (1, 2):
            self._call("damage", what="weight", layer=LAYER)
        return super().observe_streams(prompts, version=version, routes=routes)


def config(folder: Path, **sections: Any) -> RunConfig:
    short = {"steps": 4, "run_dir": folder, "warmup": TINY["warmup"] | {"steps": 10}}
    rollout = TINY["rollout"] | {"activations": "fp8"}  # type: ignore[operator]
    return parse_config(TINY | short | {"rollout": rollout} | sections)


def test_a_fault_is_told_once_by_layer_and_the_correction_is_tightened_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drift = {"every": 1, "answer": "tighten"}
    train(config(tmp_path / "run", drift=drift), False, "test", open_engine=Damaged)
    steps = metrics(tmp_path / "run")[:-1]
    warned = [line["drift/warnings"] > 0 for line in steps]
    assert warned == [False, True, True, False], "quiet before, and healed by the next update"
    assert [line["drift/answered"] for line in steps] == [0, 1, 1, 0]
    for line in steps:
        bound = 2**0.5 if line["drift/answered"] else 2.0
        assert line["rollout_corr/rollout_is_max"] <= bound + 1e-6
        worst = max((0, 1), key=lambda n: line[f"drift/{n}/unexplained"])
        assert worst == LAYER or not line["drift/warnings"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"drift in layer {LAYER}: ") == 1
    assert (tmp_path / "run" / "drift.png").exists()


@pytest.mark.long
def test_scales_that_were_measured_badly_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    measure, scales = Calibration.measure, KVCalibrator.scales

    def bad_at_first(self: Any, seen: Any, version: int) -> KVScales:
        amax = seen.amax() / (32 if version == 0 else 1)  # a calibration that saw next to nothing
        return KVScales.from_amax(amax, version=version, tokens=seen.tokens)

    def noted(self: Any, version: int, *, anew: bool = False) -> Any:
        asked.append(anew)
        return measure(self, version, anew=anew)

    monkeypatch.setattr(KVCalibrator, "scales", bad_at_first)
    monkeypatch.setattr(Calibration, "measure", noted)
    made = config(
        tmp_path / "run",
        kv_scales={"recalibrate": "once", "calibration_tokens": 32},
        drift={"every": 1, "answer": "recalibrate"},
    )
    train(made, False, "test")
    monkeypatch.setattr(KVCalibrator, "scales", scales)
    steps = metrics(tmp_path / "run")[:-1]
    assert asked == [False, True, False, False, False], "at once, and no longer than needed"
    assert [line["drift/answered"] for line in steps] == [0, 1, 0, 0]
    assert [line["drift/warnings"] > 0 for line in steps] == [True, False, False, False]
    assert steps[1]["kv/tokens"] > 2 * steps[0]["kv/tokens"], "on more tokens"
    cache = [max(line[f"drift/{n}/cache"] for n in (0, 1)) for line in steps]
    assert cache[0] > 0.2 > 2 * cache[1]


@pytest.mark.long
@pytest.mark.parametrize("ranks", ["tensor_parallel", "pipeline_parallel"])
def test_a_trainer_over_two_ranks_finds_what_one_finds(tmp_path: Path, ranks: str) -> None:
    shape = {"model": {"num_layers": 2, "num_kv_heads": 4}, "steps": 2, "drift": {"every": 1}}
    found = []
    for name, trainer in (("one", {}), ("two", {ranks: 2})):
        both = TINY["trainer"] | trainer  # type: ignore[operator]
        made = config(tmp_path / name, trainer=both, **shape)
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_config(made))
        command = Command(made.run_dir, file, "--json")
        assert command.end().code == 0, command.said()
        found.append(next(line for line in metrics(made.run_dir) if "drift/tokens" in line))
    one, two = found
    names = [name for name in one if name.startswith("drift/")]
    assert names == [name for name in two if name.startswith("drift/")]
    for name in (n for n in names if n.endswith(("own", "weights", "cache", "activations"))):
        assert two[name] == pytest.approx(one[name], rel=0.2), name
    assert two["drift/embedding"] == two["drift/warnings"] == 0


@pytest.mark.long
def test_a_resumed_run_has_not_forgotten_what_was_told(tmp_path: Path) -> None:
    drift = {"every": 1, "warn_logprob": 1e-6}  # which every probe passes
    folder = tmp_path / "run"
    made = config(folder, drift=drift, checkpoint_every=1)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(made))
    first = Command(folder, file, "--json")
    first.wait_for_a_step(after=1)
    first.ctrl_c()
    first.end()
    assert "nats between log-probs" in " ".join(first.said().split())
    again = Command(folder, "--resume", folder, "--json")
    assert again.end().code == 0, again.said()
    assert "nats between log-probs" not in " ".join(again.said().split())
    assert all(line["drift/warnings"] == 1 for line in metrics(folder)[:-1])
