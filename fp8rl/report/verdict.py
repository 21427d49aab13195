"""Is FP8 safe for this run: what its checks amount to, in one word and a sentence.

    not safe        a check is bad
    not enough data fewer than 10 steps with a measured mismatch, and nothing is bad
    watch           a check says watch
    safe            none does

A BF16 run has no FP8 to judge; its checks are shown all the same, since they are what an FP8 run
compares with. A bad check is a fact about the run, not about its cause: a reward can collapse in
BF16 too, and a BF16 run beside it tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp8rl.report.check import Check
from fp8rl.report.checks_mismatch import (
    corrected,
    divergence,
    probabilities,
    routers,
    sample_size,
)
from fp8rl.report.checks_training import drift, gradients, proven, reward, saturation
from fp8rl.report.data import RunData
from fp8rl.report.page import State
from fp8rl.report.words import percent

CHECKS = (
    probabilities,
    divergence,
    corrected,
    sample_size,
    routers,
    saturation,
    reward,
    gradients,
    proven,
    drift,
)
LEAST_STEPS = 10  # with a measured mismatch
WORDS: dict[State, str] = {
    "good": "Safe",
    "watch": "Watch",
    "bad": "Not safe",
    "unknown": "Not enough data",
}


@dataclass(frozen=True)
class Verdict:
    """The answer for one run: a state, its word, a sentence, and the checks behind it."""

    state: State
    word: str
    sentence: str
    checks: tuple[Check, ...]

    def named(self, *states: State) -> list[str]:
        """The names of the checks in these states, as they stand in a sentence."""
        return [check.name for check in self.checks if check.state in states]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without the sources."""
        shown = ("name", "state", "found", "asks")
        rows = [{key: getattr(check, key) for key in shown} for check in self.checks]
        return {"state": self.state, "word": self.word, "checks": rows}


def judge(run: RunData) -> Verdict:
    """Look at a run with all the checks that apply to it."""
    checks = tuple(check for make in CHECKS for check in make(run))
    verdict = Verdict(_state(run, checks), "", "", checks)
    if run.precision == "bf16":
        found = verdict.named("watch", "bad")
        remark = f"Worth a look all the same: {in_a_sentence(found)}." if found else _passed(checks)
        return Verdict("unknown", "BF16 run", f"There is no FP8 here to judge. {remark}", checks)
    return Verdict(verdict.state, WORDS[verdict.state], _sentence(run, verdict), checks)


def _state(run: RunData, checks: Sequence[Check]) -> State:
    found = {check.state for check in checks}
    if "bad" in found:
        return "bad"
    if len(run.series("rollout_corr/k3_kl")) < LEAST_STEPS:
        return "unknown"
    return "watch" if "watch" in found else "good"


def _sentence(run: RunData, verdict: Verdict) -> str:
    if verdict.state == "unknown":
        measured = len(run.series("rollout_corr/k3_kl"))
        return f"{measured} steps measured the mismatch; a verdict takes {LEAST_STEPS}."
    if verdict.state == "bad":
        failed = in_a_sentence(verdict.named("bad"))
        return f"Failed: {failed}. Whether FP8 is the cause, a BF16 run beside this one tells."
    if verdict.state == "watch":
        return f"Nothing failed, but look at: {in_a_sentence(verdict.named('watch'))}."
    return _passed(verdict.checks)


def in_plain_words(run: RunData) -> list[str]:
    """The two numbers that matter most, as sentences; none where they were not measured."""
    sentences = []
    mismatch = run.series("rollout_corr/token_mult_prob_error").median
    if mismatch is not None:
        sentences.append(
            f"In the median step the engine's probability of a sampled token is "
            f"{percent(mismatch - 1)} off the trainer's."
        )
    heldout = run.series("reward/heldout")
    if len(heldout) > 1:
        sentences.append(
            f"The held-out reward went from {heldout.first:.2f} to {heldout.last:.2f} in "
            f"{run.steps} steps."
        )
    return sentences


def _passed(checks: Sequence[Check]) -> str:
    passed = sum(check.state == "good" for check in checks)
    if passed == len(checks):
        return f"All {passed} checks passed."
    return f"{passed} checks passed; {len(checks) - passed} could not be made."


def in_a_sentence(names: Sequence[str]) -> str:
    """Names of checks as a list, in small letters."""
    lowered = [name[0].lower() + name[1:] if not name[1].isupper() else name for name in names]
    return ", ".join(lowered)
