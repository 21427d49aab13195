"""Runs that fall back: what is at fault in a real engine is BF16 in the next one, for good."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fp8rl.config.file import dump_config, parse_config
from fp8rl.config.run import RunConfig
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineDiedError
from fp8rl.loop import train
from fp8rl.quant import KVCalibrator, KVScales
from fp8rl.run_dir import RunDir
from fp8rl.stability.lane import EngineKeeper
from fp8rl.sync.streams import StreamObservation
from tests.fp8rl.run_helpers import TINY, Command, metrics, numbers

LAYER = 1
pytestmark = pytest.mark.slow


class Engines:
    """Opens engines as a run asks for them, and takes note of each.

    fault_from: the version from which a weight of an engine with FP8 weights changes after the
    proof, before each probe. stop_at: the version whose probe is interrupted by Ctrl-C, once.
    broken: the number of the engine that does not start.
    """

    def __init__(self, *, fault_from: int = 99, stop_at: int = 99, broken: int = 99) -> None:
        self.fault_from, self.stop_at, self.broken = fault_from, stop_at, broken
        self.started: list[RolloutEngine] = []

    def __call__(self, settings: EngineSettings, folder: Path) -> RolloutEngine:
        assert all(not runs(engine) for engine in self.started), "one at a time"
        module = "tests.fp8rl.drift_worker"
        if len(self.started) == self.broken:
            module = "tests.fp8rl.no_such_worker"
        self.started.append(Watched(self, settings, folder, module))
        return self.started[-1]

    @property
    def precisions(self) -> list[str]:
        return [engine.settings.precision for engine in self.started]


class Watched(RolloutEngine):
    def __init__(self, engines: Engines, settings: EngineSettings, folder: Path, module: str):
        super().__init__(settings, folder, module=module)
        self._engines = engines

    def observe_streams(self, prompts: Any, *, version: int, routes: bool) -> StreamObservation:
        if version == self._engines.stop_at:
            self._engines.stop_at = 99
            raise KeyboardInterrupt
        if version >= self._engines.fault_from and self.settings.precision in ("fp8", "fp8-kv"):
            self._call("damage", what="weight", layer=LAYER)
        return super().observe_streams(prompts, version=version, routes=routes)


def runs(engine: RolloutEngine) -> bool:
    return Path(f"/proc/{engine.pid}").exists()


def config(folder: Path, **sections: Any) -> RunConfig:
    short = {"steps": 4, "run_dir": folder, "warmup": TINY["warmup"] | {"steps": 10}}
    rollout = TINY["rollout"] | {"activations": "fp8"}  # type: ignore[operator]
    drift = {"every": 1, "answer": "fall-back"}
    return parse_config(TINY | short | {"rollout": rollout, "drift": drift} | sections)


def column(folder: Path, name: str) -> list[Any]:
    """A metric at each step; None where a step has none."""
    return [line.get(name) for line in metrics(folder)]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose FP8 weights are at fault at version 1, never interrupted."""
    folder = tmp_path_factory.mktemp("faulty") / "run"
    engines = Engines(fault_from=1)
    train(config(folder), False, "test", open_engine=engines)
    assert engines.precisions == ["fp8-kv", "kv-only"], "restarted once, and never back"
    assert not any(map(runs, engines.started))
    return folder


def test_weights_at_fault_are_bf16_from_the_next_step_on(faulty: Path) -> None:
    assert column(faulty, "drift/precision") == ["fp8-kv", "fp8-kv", *["kv-only"] * 3]
    warned = [bool(count) for count in column(faulty, "drift/warnings")[:-1]]
    assert warned == [False, True, False, False], "the drift is gone at the next probe"
    assert column(faulty, "drift/1/weights")[2:4] == [None, None], "no rounding of weights is left"
    assert all(value > 0 for value in column(faulty, "drift/1/cache")[:-1]), "the cache is FP8"
    [why] = [text for text in column(faulty, "drift/fall_back") if text]
    assert f"of what the layer adds is unexplained in layer {LAYER}" in why
    assert column(faulty, "drift/fall_back").index(why) == 1


def test_the_new_engine_is_proven_and_keeps_its_scales(faulty: Path) -> None:
    assert all(column(faulty, "sync/seconds"))
    sent, bf16 = column(faulty, "sync/bytes"), column(faulty, "sync/bf16_bytes")
    assert sent[1] < 0.6 * bf16[1] and sent[2] == pytest.approx(bf16[2], rel=0.01)
    assert all(column(faulty, "kv_scale/1/k")), "measured and confirmed at every version"


@pytest.mark.long
def test_a_run_that_is_stopped_after_it_fell_back_resumes_there(
    faulty: Path, tmp_path: Path
) -> None:
    folder, engines = tmp_path / "run", Engines(fault_from=1, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder), False, "test", open_engine=engines)
    assert engines.precisions == ["fp8-kv", "kv-only"] and not any(map(runs, engines.started))
    train(config(folder), True, "test", open_engine=engines)
    assert engines.precisions[2:] == ["kv-only"], "at once"
    assert numbers(folder) == numbers(faulty), "as if never stopped"


def test_an_engine_that_does_not_start_is_told_and_tried_again(
    faulty: Path, tmp_path: Path
) -> None:
    folder, engines = tmp_path / "run", Engines(fault_from=1, broken=1)
    with pytest.raises(EngineDiedError, match="falls back to kv-only, but the new engine did not"):
        train(config(folder), False, "test", open_engine=engines)
    assert not any(map(runs, engines.started))
    assert "no_such_worker" in RunDir.open(folder).engine_log.read_text()
    train(config(folder), True, "test", open_engine=engines)
    assert engines.precisions[2:] == ["kv-only"], "nothing is done twice"
    assert numbers(folder) == numbers(faulty)


def test_a_cache_at_fault_is_bf16_and_has_no_scales_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(self: Any, seen: Any, version: int) -> KVScales:
        amax = seen.amax() / 32  # a calibration that saw next to nothing
        return KVScales.from_amax(amax, version=version, tokens=seen.tokens)

    monkeypatch.setattr(KVCalibrator, "scales", bad)
    folder, engines = tmp_path / "run", Engines()
    train(config(folder, steps=2), False, "test", open_engine=engines)
    assert engines.precisions == ["fp8-kv", "fp8"]
    assert engines.started[1].settings.activations == "fp8", "weights stay as they were"
    assert column(folder, "drift/precision") == ["fp8-kv", "fp8", "fp8"]
    first, second, _ = metrics(folder)
    assert first["drift/warnings"] > 0 == second["drift/warnings"]
    assert "kv_scale/1/k" in first and "drift/1/cache" in first
    assert not any(name.startswith(("kv", "drift/1/cache")) for name in second)
    assert second["drift/1/weights"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("from the next step on a new engine runs in fp8 in place of fp8-kv") == 1


ANY_PROBE = {"every": 1, "answer": "fall-back", "warn_logprob": 1e-6}  # passes: both parts at once


def command(folder: Path, **sections: Any) -> Command:
    """A run by the command line, of two steps, whose first probe asks for a BF16 engine."""
    file = folder.with_suffix(".yaml")
    file.write_text(dump_config(config(folder, steps=2, drift=ANY_PROBE, **sections)))
    return Command(folder, file, "--json")


@pytest.mark.long
def test_a_run_stopped_while_the_new_engine_starts_leaves_nothing_and_goes_on(
    tmp_path: Path,
) -> None:
    folder, ends = tmp_path / "run", []
    first = command(folder)
    first.wait_until("second engine", lambda: len(first.engines()) == 2)
    first.send(signal.SIGKILL)
    ends.append(first.end())
    again = Command(folder, "--resume", folder, "--json")
    again.wait_for_engine()
    again.ctrl_c()
    ends.append(again.end())
    last = Command(folder, "--resume", folder, "--json")
    last.wait_for_a_step()
    ends.append(last.end())
    assert [end.code for end in ends] == [-signal.SIGKILL, 130, 0], last.said()
    assert [end.engines for end in ends] == [2, 1, 1], "resumed in the new precision at once"
    assert all((end.survivors, end.litter) == ([], set()) for end in ends)
    assert column(folder, "drift/precision") == ["fp8-kv", "bf16", "bf16"]
    assert f"fp8rl train --resume {folder}" in ends[1].errors
    result = json.loads(ends[2].output.splitlines()[-1])
    [told] = result["fell_back"]
    assert (told["step"], told["precision"], result["precision"]) == (1, "bf16", "bf16")
    assert "nothing is left to fall back to" in " ".join(last.said().split())


@pytest.mark.long
def test_ctrl_c_while_the_new_engine_starts_ends_the_step_or_at_once(tmp_path: Path) -> None:
    for name, times in (("once", 1), ("twice", 2)):
        run = command(tmp_path / name)
        run.wait_until("second engine", lambda run=run: len(run.engines()) == 2)
        for _ in range(times):
            run.ctrl_c()
            time.sleep(1.0)
        end = run.end()
        assert end.code == 130 and (end.survivors, end.litter) == ([], set()), run.said()
        assert end.steps == [0, 1][: 3 - times] and end.checkpoints[-1] == end.steps[-1] + 1


@pytest.mark.long
@pytest.mark.parametrize("ranks", ["tensor_parallel", "pipeline_parallel"])
def test_all_ranks_of_a_trainer_fall_back_together(tmp_path: Path, ranks: str) -> None:
    folder, trainer = tmp_path / "run", TINY["trainer"] | {ranks: 2}  # type: ignore[operator]
    shape = {"num_layers": 2, "num_kv_heads": 4}
    run = command(folder, trainer=trainer, model=shape)
    run.wait_until("second engine", lambda: len(run.engines()) == 2)
    end = run.end()
    assert end.code == 0, run.said()
    assert (end.engines, end.survivors) == (2, [])
    assert column(folder, "drift/precision") == ["fp8-kv", "bf16", "bf16"]
    assert run.said().count("a new engine runs in bf16") == 1, "rank 0 alone says it"


@pytest.mark.long
def test_experts_and_rounded_routers_fall_back_with_the_weights(tmp_path: Path) -> None:
    folder, engines = tmp_path / "run", Engines()
    experts = {"num_experts": 8, "experts_per_token": 2, "moe_ffn_hidden_size": 128}
    rollout = {"activations": "fp8", "scale_format": "fp32", "router": "fp8-rounded"}
    made = config(
        folder,
        steps=2,
        model={"num_layers": 2, "family": "qwen3_moe", **experts},
        rollout=TINY["rollout"] | rollout,  # type: ignore[operator]
        drift=ANY_PROBE,
    )
    train(made, False, "test", open_engine=engines, draws=False)
    new = engines.started[1].settings
    assert engines.precisions == ["fp8-kv", "bf16"]
    assert (new.activations, new.scale_format, new.router) == (None, "pow2", "bf16")
    first, second, _ = metrics(folder)
    for layer in (0, 1):
        assert second[f"drift/{layer}/own"] < 0.02 < first[f"drift/{layer}/own"], "BF16 beside BF16"


@pytest.mark.long
def test_an_engine_kept_for_many_runs_is_replaced_by_the_one_fallen_back_to(tmp_path: Path) -> None:
    engines = EngineKeeper()
    try:
        made = config(tmp_path / "run", steps=1, drift=ANY_PROBE)
        train(made, False, "test", open_engine=engines.open, draws=False)
        assert column(tmp_path / "run", "drift/precision") == ["fp8-kv", "bf16"]
        kept = engines._engine
        assert kept is not None and kept.settings.precision == "bf16" and runs(kept)
    finally:
        engines.close()
