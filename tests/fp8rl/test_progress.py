"""The display: a table on a terminal, lines elsewhere, silence where disabled; one clock."""

import io
import time

import pytest
from rich.console import Console

from fp8rl.progress import Progress, clock

METRICS = {
    "reward/train": 0.5,
    "rollout_corr/k3_kl": 1.2e-3,
    "rollout_corr/token_mult_prob_error": 1.021,
    "rollout_corr/rollout_is_ratio_fraction_high": 0.0008,
    "rollout_corr/rollout_rs_masked_fraction": 0.0,
    "sync/seconds": 0.093,
    "rollout/tokens_per_second": 5231.0,
}


def show(terminal: bool, steps: int = 3, width: int = 100, **keywords) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with Progress(4, "FP8 run", console, **keywords) as progress:
        progress.message("engine [ready]")
        for step in range(1, steps + 1):
            with progress.phase("rollout"):
                pass
            heldout = {"reward/heldout": 0.25} if step == 2 else {}
            progress.step({"step": step, **METRICS, **heldout})
    return out.getvalue()


def test_a_log_gets_readable_lines_but_not_too_many():
    lines = show(terminal=False, steps=4).splitlines()
    assert lines[:2] == ["FP8 run", "engine [ready]"]
    assert lines[2] == (
        "step 1/4  reward 0.500  KL k3 1.2e-03  exp|dlp| 1.0210  trunc. 0.08%  reject. 0%  "
        "sync ms 93  tok/s 5,231  ETA ?"
    )
    # step 2 was evaluated, step 4 is the last; step 3 came too soon after
    assert [line.split("  ")[0] for line in lines[3:]] == ["step 2/4", "step 4/4"]
    assert "held-out 0.250" in lines[3]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_table_that_fits(width):
    shown = show(terminal=True, width=width)
    for text in ("FP8 run", "engine [ready]", "held-out", "0.250", "1.2e-03", "5,231", "3/4"):
        assert text in shown
    assert "last step, s: rollout" in shown


def test_disabled_shows_nothing():
    assert show(terminal=True, enabled=False) == show(terminal=False, enabled=False) == ""


@pytest.mark.parametrize("enabled", [True, False])
def test_phases_add_up_within_a_step_and_start_anew_with_the_next(enabled):
    progress = Progress(2, "run", Console(file=io.StringIO()), enabled=enabled)
    with progress:
        for _ in range(2):
            with progress.phase("train"), progress.phase("score"):
                time.sleep(0.02)
        seconds = progress.phase_seconds()
        assert set(seconds) == {"train", "score"}
        assert 0.04 <= seconds["score"] <= seconds["train"] < 1
        progress.step({"step": 1})
        assert progress.phase_seconds() == {}


def test_a_phase_that_fails_is_measured_and_the_error_goes_on():
    progress = Progress(2, "run", Console(file=io.StringIO()))
    with pytest.raises(KeyboardInterrupt), progress, progress.phase("rollout"):
        raise KeyboardInterrupt
    assert set(progress.phase_seconds()) == {"rollout"}


def test_the_clock_reads_as_one_reads_it():
    assert [clock(s) for s in (0, 9.6, 61, 3661)] == ["0:00", "0:10", "1:01", "1:01:01"]
