"""What is a collapse and what is not, and which signal came first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.run_dir import Metrics
from fp8rl.stability.collapse import SIGNALS, Collapse, collapse

REWARD, PROMPTS = "reward/heldout", 512
IN_ORDER = {
    "rollout_corr/token_mult_prob_error": 1.01,
    "rollout_corr/rollout_is_raw_eff_sample_size": 0.99,
    "policy/entropy": 0.8,
    "kv/saturation_max": 0.0,
    "grad_norm": 0.5,
}


def lines(rewards: Sequence[float], every: int = 5) -> list[Metrics]:
    """A run that was evaluated every few steps, with all signals in order."""
    made: list[Metrics] = [{"step": step, **IN_ORDER} for step in range(every * len(rewards))]
    for number, value in enumerate(rewards):
        made[every * number][REWARD] = value
    return made


def found_in(made: list[Metrics], **more: Any) -> Collapse | None:
    return collapse(made, reward=REWARD, prompts=PROMPTS, **more)


def test_a_reward_that_is_lost_and_stays_lost_is_a_collapse() -> None:
    found = found_in(lines([0.1, 0.4, 0.8, 0.7, 0.2, 0.05, 0.0]))
    assert found is not None
    assert (found.step, found.best, found.best_step, found.found) == (20, 0.8, 10, 0.2)
    assert found.causes == ()
    assert "no signal" in found.why


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1, 0.4, 0.8, 0.2, 0.7, 0.8],  # it came back
        [0.1, 0.4, 0.8, 0.5, 0.5, 0.5],  # not below half
        [0.1, 0.4, 0.8, 0.8, 0.8, 0.1],  # one evaluation is not yet a collapse
        [0.0, 0.0, 0.0, 0.0, 0.0],  # never learned
        [0.02, 0.005, 0.008, 0.004, 0.006],  # noise: of 512 answers 10, and then 3
        [],
    ],
)
def test_no_collapse(rewards: list[float]) -> None:
    assert found_in(lines(rewards)) is None


@given(st.lists(st.floats(0, 1), max_size=12))
def test_a_reward_that_never_falls_never_collapses(rewards: list[float]) -> None:
    assert found_in(lines(sorted(rewards))) is None


@given(st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_sampling_alone_is_no_collapse(chance: float, seed: int) -> None:
    rng = random.Random(seed)
    drawn = [sum(rng.random() < chance for _ in range(PROMPTS)) / PROMPTS for _ in range(8)]
    assert found_in(lines(drawn)) is None


@given(st.integers(1, 6), st.floats(0.3, 1.0), st.floats(0, 0.1))
def test_the_step_is_that_of_the_first_evaluation_below(n: int, best: float, rest: float) -> None:
    found = found_in(lines([best] * n + [rest] * 2))
    assert found is not None
    assert (found.step, found.best_step) == (5 * n, 0)


@pytest.mark.parametrize(("name", "bad"), [(s.name, s) for s in SIGNALS])
def test_a_signal_out_of_bounds_before_the_collapse_is_named(name: str, bad: Any) -> None:
    made = lines([0.1, 0.8, 0.8, 0.1, 0.0])
    low, high = bad.bounds([IN_ORDER[bad.key]])
    for line in made[9:]:
        line[bad.key] = 2 * high + 1 if high < float("inf") else low / 2
    found = found_in(made)
    assert found is not None
    [cause] = found.causes
    assert (cause.signal, cause.step) == (name, 10), "two of three steps are out at step 10"
    assert name in found.why and "step 10" in found.why


def test_what_was_out_of_bounds_while_it_learned_is_named_last_and_as_such() -> None:
    made = lines([0.1, 0.4, 0.8, 0.7, 0.2, 0.05, 0.0])
    for line in made:
        line["rollout_corr/token_mult_prob_error"] = 5.0
    always = found_in(made)
    assert always is not None
    assert "mismatch from step 2 on, while it still learned: 5" in always.why
    for line in made[15:]:
        line["policy/entropy"] = 3.0
    found = found_in(made)
    assert found is not None
    assert [c.signal for c in found.causes] == ["entropy", "mismatch"]
    assert found.why.startswith("entropy first, at step 16")


def test_causes_come_in_the_order_of_their_steps_and_single_spikes_are_none() -> None:
    made = lines([0.1, 0.8, 0.8, 0.1, 0.0])
    made[7]["grad_norm"] = 1e6
    for line in made[10:]:
        line["policy/entropy"] = 0.001
    for line in made[8:]:
        line["rollout_corr/token_mult_prob_error"] = float("nan")
    found = found_in(made)
    assert found is not None
    assert [(c.signal, c.step) for c in found.causes] == [("mismatch", 9), ("entropy", 11)]


def test_what_happens_after_the_collapse_is_no_cause() -> None:
    made = lines([0.1, 0.8, 0.8, 0.1, 0.0])
    for line in made[16:]:
        line["grad_norm"] = 1e6
    found = found_in(made)
    assert found is not None and found.causes == ()


def test_a_run_whose_numbers_broke_has_collapsed_there() -> None:
    made = lines([0.1, 0.8, 0.8])
    for line in made[11:]:
        line["grad_norm"] = float("inf")
    found = found_in(made, broke_at=13)
    assert found is not None
    assert (found.step, found.best, found.found) == (13, 0.8, None)
    assert [(c.signal, c.step) for c in found.causes] == [("gradient norm", 12)]
