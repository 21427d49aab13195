"""Is FP8 safe: what each check says of runs of which it is known, and what they amount to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fp8rl.report.check import Check
from fp8rl.report.checks_mismatch import touched
from fp8rl.report.data import RunData
from fp8rl.report.verdict import CHECKS, Verdict, judge
from tests.fp8rl.report_runs import Metrics, make_run

EXP_ABS, K3 = "rollout_corr/token_mult_prob_error", "rollout_corr/k3_kl"
ESS, CUT = "rollout_corr/rollout_is_eff_sample_size", "rollout_corr/rollout_is_ratio_fraction_high"
REJECTED = "rollout_corr/rollout_rs_masked_fraction"


def verdict(folder: Path, change: Any = lambda step, line: {}, **config: Any) -> Verdict:
    return judge(RunData.load(make_run(folder / "run", change=change, **config).path))


def check(found: Verdict, name: str) -> Check:
    [one] = [check for check in found.checks if check.name == name]
    return one


def always(**values: float | None) -> Any:
    """Every step that learned has these values; None: it has none."""
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return lambda step, line: named if step else {}


def test_a_run_in_which_all_is_well_is_safe(tmp_path: Path) -> None:
    found = verdict(tmp_path)
    assert (found.state, found.word) == ("good", "Safe")
    assert found.sentence == "All 9 checks passed."
    assert {one.state for one in found.checks} == {"good"}


@pytest.mark.parametrize(
    ("name", "key", "value", "state"),
    [
        ("Mismatch of probabilities", EXP_ABS, 1.029, "good"),
        ("Mismatch of probabilities", EXP_ABS, 1.031, "watch"),
        ("Mismatch of probabilities", EXP_ABS, 1.051, "bad"),
        ("Mismatch of probabilities", EXP_ABS, None, "unknown"),
        ("Mismatch KL (k3)", K3, 0.0019, "good"),
        ("Mismatch KL (k3)", K3, 0.0021, "watch"),
        ("Mismatch KL (k3)", K3, 0.011, "bad"),
        ("Tokens corrected", CUT, 0.009, "good"),
        ("Tokens corrected", CUT, 0.011, "watch"),
        ("Tokens corrected", CUT, 0.11, "bad"),
        ("Effective sample size", ESS, 0.51, "good"),
        ("Effective sample size", ESS, 0.49, "watch"),
        ("Effective sample size", ESS, 0.29, "bad"),
        ("KV-cache saturation", "kv/saturation_max", 0.0009, "good"),
        ("KV-cache saturation", "kv/saturation_max", 0.0011, "watch"),
        ("KV-cache saturation", "kv/saturation_max", None, "unknown"),
        ("Gradient norms", "grad_norm", None, "unknown"),
        ("Gradient norms", "grad_norm", math.nan, "bad"),
        ("Gradient norms", "grad_norm", math.inf, "bad"),
        ("Router agreement", "router/agreement", 0.91, "good"),
        ("Router agreement", "router/agreement", 0.89, "watch"),
        ("Drift warnings", "drift/warnings", 0, "good"),
        ("Drift warnings", "drift/warnings", 1, "watch"),
        ("Updates proven", "sync/seconds", None, "unknown"),
    ],
)
def test_a_level_is_judged_by_its_threshold(
    tmp_path: Path, name: str, key: str, value: float | None, state: str
) -> None:
    found = check(verdict(tmp_path, always(**{key: value})), name)
    assert found.state == state
    assert found.source.keys[0] == key and found.source.reference


def test_a_run_that_goes_wrong_at_its_end_is_seen(tmp_path: Path) -> None:
    found = verdict(tmp_path, lambda step, line: {K3: 0.012} if step > 15 else {K3: 0.0005})
    assert check(found, "Mismatch KL (k3)").state == "bad"
    assert "0.012 in the last steps" in check(found, "Mismatch KL (k3)").found


def test_one_token_that_makes_one_step_does_not_make_the_run(tmp_path: Path) -> None:
    whole = verdict(tmp_path, lambda s, _: {EXP_ABS: 1e6} if s == 7 else {})
    found = check(whole, "Mismatch of probabilities")
    assert found.state == "good"
    assert "above 1.05 in 1 of 20 steps" in found.found


def test_mismatch_that_grows_is_told_from_mismatch_that_does_not(tmp_path: Path) -> None:
    grows = verdict(tmp_path / "a", lambda step, line: {K3: 1e-4 * 1.1**step})
    assert check(grows, "Mismatch over time").state == "watch"
    assert check(grows, "Mismatch over time").found.startswith("6.7\u00d7 from first to last")
    little = verdict(tmp_path / "b", lambda step, line: {K3: 1e-4 * 1.02**step})
    assert check(little, "Mismatch over time").state == "good"


@pytest.mark.parametrize(
    ("rewards", "state"),
    [
        ((0.1, 0.3, 0.5, 0.7, 0.8), "good"),
        ((0.1, 0.8, 0.8, 0.79, 0.8), "good"),
        ((0.1, 0.8, 0.8, 0.7, 0.7), "watch"),  # 13 standard errors, a seventh of the gain
        ((0.1, 0.8, 0.8, 0.2, 0.1), "bad"),
        ((0.5, 0.1, 0.0, 0.0, 0.0), "bad"),  # it never rose
    ],
)
def test_a_reward_that_falls_for_good_has_collapsed(
    tmp_path: Path, rewards: tuple[float, ...], state: str
) -> None:
    def change(step: int, line: Metrics) -> Metrics:
        return {"reward/heldout": rewards[step // 5]} if step % 5 == 0 else {}

    assert check(verdict(tmp_path, change), "Held-out reward").state == state


def test_a_spike_of_the_gradient_is_found_with_its_step(tmp_path: Path) -> None:
    found = verdict(tmp_path, lambda s, _: {"grad_norm": 5.0} if s == 32 else {}, steps=40)
    assert check(found, "Gradient norms").found == "1 spikes, first in step 32"
    assert found.state == "watch"


def test_spikes_are_not_denied_before_one_could_be_seen(tmp_path: Path) -> None:
    for steps, found in ((20, "finite; too short for spikes"), (21, "finite, no spikes")):
        norms = check(verdict(tmp_path / str(steps), steps=steps), "Gradient norms")
        assert (norms.state, norms.found) == ("good", found)


def test_a_token_that_mis_both_counts_and_rejects_is_touched_once(tmp_path: Path) -> None:
    both = {CUT: 0.06, REJECTED: 0.07}  # with MIS all that are above the bound are rejected
    found = check(verdict(tmp_path, lambda step, line: both if step else {}), "Tokens corrected")
    assert (found.state, found.found) == ("watch", "7 %")
    assert "at least" in found.source.what


def test_shares_of_tokens_are_put_together_by_their_steps(tmp_path: Path) -> None:
    def change(step: int, line: Metrics) -> dict[str, float | None]:
        late = {CUT: None, REJECTED: 0.5} if step == 2 else {CUT: 0.3, REJECTED: None}
        return {} if step == 0 else {CUT: 0.1, REJECTED: 0.2} if step == 4 else late

    run = RunData.load(make_run(tmp_path / "run", change=change, steps=4).path)
    assert (touched(run).steps, touched(run).values) == ((1, 2, 3, 4), (0.3, 0.5, 0.3, 0.2))
    old = RunData.load(
        make_run(tmp_path / "old", change=always(**{CUT: None, REJECTED: None})).path
    )
    assert touched(old).mean is None


def test_without_a_correction_there_is_nothing_to_correct(tmp_path: Path) -> None:
    found = verdict(tmp_path, correction={"stages": []})
    assert "Tokens corrected" not in [one.name for one in found.checks]


def test_a_bf16_run_is_not_judged_but_looked_at(tmp_path: Path) -> None:
    well = verdict(tmp_path / "a", rollout={"precision": "bf16"})
    assert (well.state, well.word) == ("unknown", "BF16 run")
    assert "There is no FP8 here to judge. All 8 checks passed." in well.sentence
    ill = verdict(tmp_path / "b", always(grad_norm=math.nan), rollout={"precision": "bf16"})
    assert ill.word == "BF16 run" and "gradient norms" in ill.sentence


def test_few_steps_are_not_enough_but_a_failure_is_a_failure(tmp_path: Path) -> None:
    few = verdict(tmp_path / "a", lambda s, _: {K3: None} if s > 9 else {})
    assert (few.word, few.sentence) == (
        "Not enough data",
        "9 steps measured the mismatch; a verdict takes 10.",
    )
    broken = {K3: None, "grad_norm": math.nan}
    failed = verdict(tmp_path / "b", lambda s, _: broken if s > 9 else {})
    assert failed.word == "Not safe"


def test_the_worst_check_gives_the_verdict(tmp_path: Path) -> None:
    watch = verdict(tmp_path / "a", always(**{K3: 0.005}))
    assert (watch.word, watch.sentence) == (
        "Watch",
        "Nothing failed, but look at: mismatch KL (k3).",
    )
    bad = verdict(tmp_path / "b", always(**{K3: 0.005, EXP_ABS: 1.2}))
    assert bad.word == "Not safe"
    assert bad.sentence.startswith("Failed: mismatch of probabilities. Whether FP8 is the cause")


def test_metrics_of_an_older_version_leave_checks_open(tmp_path: Path) -> None:
    old = {"mismatch/k3": 1e-4, K3: None, EXP_ABS: None, ESS: None, CUT: None}
    found = verdict(tmp_path, lambda step, line: old)
    assert found.word == "Not enough data"
    assert len(found.checks) == len(CHECKS) - 1  # the divergence makes two; router and drift none
