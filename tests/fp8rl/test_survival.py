"""A run that is stopped, killed and robbed of its engine ends as if nothing had happened.

One run is hurt in turn in all these ways and resumed after each; a second one is never touched.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from tests.fp8rl.conftest import Whole
from tests.fp8rl.run_helpers import STEPS, Command, End, metrics, numbers

pytestmark = [pytest.mark.slow, pytest.mark.long]  # a dozen real engines

WARM_UP = ["Ctrl-C in the warm-up", "SIGKILL in the warm-up"]
MID_RUN = ["SIGKILL in a step", "engine killed", "engine frozen, Ctrl-C twice", "Ctrl-C in a step"]
CTRL_C = [name for name in WARM_UP + MID_RUN if "Ctrl-C" in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is hurt."""
    return tmp_path_factory.mktemp("survival") / "run"


@pytest.fixture(scope="module")
def ends(whole: Whole, folder: Path) -> dict[str, End]:
    """What was done to the run -> how the command ended; "resumed" is the last."""
    ends: dict[str, End] = {}

    command = Command(folder, whole.config, f"run_dir={folder}")
    command.wait_for_engine()
    time.sleep(1.0)
    command.ctrl_c()
    ends["Ctrl-C in the warm-up"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_engine()
    time.sleep(1.0)  # the warm-up takes several
    command.send(signal.SIGKILL)
    ends["SIGKILL in the warm-up"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_a_step(after=3)  # version 3 is saved, and a step has begun
    time.sleep(0.05)
    command.send(signal.SIGKILL)
    ends["SIGKILL in a step"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_a_step()
    command.kill_engine()
    ends["engine killed"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_a_step()
    for engine in command.engines():
        engine.suspend()
    command.wait_for_a_standstill()  # a step that needs the engine has begun: it can never end
    command.ctrl_c()
    time.sleep(2.0)
    assert command.still_runs(), "the first Ctrl-C waits for the step"
    command.ctrl_c()
    ends["engine frozen, Ctrl-C twice"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_a_step()
    command.ctrl_c()
    ends["Ctrl-C in a step"] = command.end()

    command = Command(folder, "--resume", folder)
    command.wait_for_a_step()
    ends["resumed"] = command.end()
    return ends


@pytest.mark.parametrize("name", WARM_UP + MID_RUN + ["resumed"])
def test_no_process_and_no_shared_memory_is_left(ends: dict[str, End], name: str) -> None:
    end = ends[name]
    assert end.engines == 1, "there was one to be left"
    assert end.segments == (name not in WARM_UP)
    assert (end.survivors, end.litter) == ([], set())


@pytest.mark.parametrize("name", CTRL_C)
def test_ctrl_c_is_130_and_one_message_that_says_how_to_go_on(
    ends: dict[str, End], folder: Path, name: str
) -> None:
    assert ends[name].code == 130
    [line] = ends[name].errors.splitlines()
    assert line.endswith(f"fp8rl train --resume {folder}")
    assert ends[name].seconds < 30  # 1 or 2 on an idle machine


def test_ctrl_c_in_a_step_ends_the_step_and_saves_it(ends: dict[str, End]) -> None:
    end = ends["Ctrl-C in a step"]
    assert end.checkpoints[-1] == end.steps[-1] + 1


@pytest.mark.parametrize("name", WARM_UP)
def test_nothing_is_saved_before_the_warm_up_has_ended(ends: dict[str, End], name: str) -> None:
    assert (ends[name].checkpoints, ends[name].steps) == ([], [])


def test_sigkill_was_one_and_struck_after_a_checkpoint(ends: dict[str, End]) -> None:
    end = ends["SIGKILL in a step"]
    assert end.code == -signal.SIGKILL
    assert 0 < end.checkpoints[-1] < STEPS


def test_an_engine_that_dies_ends_the_run_with_its_log(ends: dict[str, End], folder: Path) -> None:
    end = ends["engine killed"]
    assert end.code == 1
    assert end.seconds < 30  # 1 or 2 on an idle machine
    first, *middle, last = end.errors.splitlines()
    assert "the rollout engine" in first
    assert "exit code -9" in first
    log = (folder / "engine.log").read_text()
    assert middle
    assert all(line.strip() in log for line in middle)
    assert str(folder / "engine.log") in last


def test_the_resumed_run_ends_like_any_other(ends: dict[str, End], folder: Path) -> None:
    end = ends["resumed"]
    assert (end.code, end.errors) == (0, "")
    assert end.output.splitlines()[-1] == str(folder)
    assert end.steps == list(range(STEPS + 1))
    assert (folder / "result.json").exists()


def test_its_metrics_are_bit_for_bit_those_of_the_run_never_touched(
    ends: dict[str, End], folder: Path, whole: Whole
) -> None:
    assert ends["resumed"].code == 0
    for hurt, untouched in zip(numbers(folder), numbers(whole.folder), strict=True):
        assert hurt == untouched


def test_ranks_whose_launcher_is_killed_end_with_their_engine(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = Command(folder, whole.config, f"run_dir={folder}", "trainer.tensor_parallel=2")
    command.wait_for_engine()
    command.send(signal.SIGKILL)
    end = command.end()
    assert (end.code, end.engines, end.survivors, end.litter) == (-signal.SIGKILL, 1, [], set())


def test_tensor_parallel_ranks_survive_their_engines_death(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    two = [f"run_dir={folder}", "steps=6", "trainer.tensor_parallel=2"]
    command = Command(folder, whole.config, *two)
    command.wait_for_a_step()
    command.kill_engine()
    end = command.end()
    assert end.code == 1
    assert end.seconds < 60  # 3 on an idle machine
    assert (end.errors.count("the rollout engine"), end.errors.count("Traceback")) == (1, 0)
    assert (end.engines, end.survivors, end.litter) == (1, [], set())
    _ends_like_one_rank(folder, whole)


def test_pipeline_parallel_ranks_survive_ctrl_c(whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    two = [f"run_dir={folder}", "steps=6", "trainer.pipeline_parallel=2"]
    command = Command(folder, whole.config, *two)
    command.wait_for_a_step()
    command.ctrl_c()
    end = command.end()
    assert end.code == 130
    assert end.checkpoints[-1] == end.steps[-1] + 1
    assert (end.errors.count("--resume"), end.errors.count("Traceback")) == (1, 0)
    assert (end.engines, end.survivors, end.litter) == (1, [], set())
    _ends_like_one_rank(folder, whole)


def _ends_like_one_rank(folder: Path, whole: Whole) -> None:
    """Resume a run of two ranks to its end; compare its first step with that of one rank."""
    command = Command(folder, "--resume", folder)
    command.wait_for_engine()
    end = command.end()
    assert end.code == 0, end.errors
    assert end.steps == list(range(7))
    assert (end.engines, end.survivors, end.litter) == (1, [], set())
    found, one = (torch.tensor(_agreement(at)) for at in (folder, whole.folder))
    torch.testing.assert_close(found, one, rtol=0, atol=0.02)


def _agreement(folder: Path) -> list[float]:
    """How near the engine's and the trainer's log-probs are in the first step (1: equal).

    The ranks round differently, so that two layouts learn apart in the warm-up; that the engine
    holds the policy of its own trainer is the same for all.
    """
    first = metrics(folder)[0]
    return [
        first["rollout_corr/token_mult_prob_error"],
        1 + first["rollout_corr/k3_kl"],
        first["rollout_corr/rollout_is_raw_eff_sample_size"],
    ]
