"""The paper's claims beside what a study measured: a table, each row with where it comes from.

The claims are those of FP8-RL (arXiv 2601.18150). A row is

    reproduced       the measurement says the same, with an interval that leaves no other reading
    not reproduced   it says the opposite, in the same sense, or that there is nothing that matters
    undecided        the interval allows both, or there is nothing to tell from
    not measured     the study has not the arms for it, or the machine cannot

Claims look for arms by the names of examples/stability.yaml (`ARMS`). Mismatch is a run's median k3
over steps; factors are of geometric means over seeds. Throughput comes from `fp8rl bench rollout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fp8rl.report.equivalence import Factor, Verdict, factor, judge
from fp8rl.stability.measure import Measured

Answer = Literal["reproduced", "not reproduced", "undecided", "not measured"]
MARKS: dict[Answer, str] = {
    "reproduced": "yes",
    "not reproduced": "no",
    "undecided": "undecided",
    "not measured": "not measured",
}
# What is asked of an arm in a claim -> its name in a study.
ARMS = {
    "bf16": "BF16 rollouts",
    "fp8": "FP8 weights, activations and KV cache, uncorrected",
    "fp8-tis": "the same, TIS",
    "fp8-mis": "the same, MIS",
    "kv-once": "as fp8-tis, KV scales of version 0 alone",
    "kv-never": "as fp8-tis, KV scales 1.0",
    "dense-bf16": "a dense model, BF16 rollouts",
    "dense-fp8": "the same, FP8 weights and activations, TIS",
    "dense-aligned": "as dense-fp8, with a trainer that computes in FP8 (end to end)",
    "dense-fp32-scales": "as dense-fp8, with fp32 block scales",
    "moe-bf16": "as dense-bf16, with experts",
    "moe-fp8": "as dense-fp8, with experts; router BF16",
    "moe-fp8-router": "the same, router rounded to FP8",
}
LEAST_CAPACITY = 1.9  # times the tokens, for "doubles"
LEAST_FACTOR = 1.1  # of a mismatch that is "raised"
LEAST_SPEED = 1.1  # the lower end of the paper's rollout speed-up
FASTER = ("fp8", "fp8-kv")  # the arms of `bench rollout` that the claim is about
THROUGHPUT = " / bf16, tokens/s"  # in the names of the ratios of `bench rollout` that count here


@dataclass(frozen=True)
class Claim:
    """A claim, what was measured, and whether that is what the claim says."""

    claim: str
    answer: Answer
    measured: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """A finished study, by arm: the numbers of its runs, and the verdicts."""

    rows: Mapping[str, Sequence[Measured]]
    verdicts: Mapping[str, Verdict]

    def values(self, arm: str, key: str) -> dict[int, float]:
        """A number of an arm's runs, by seed."""
        found = {row.seed: getattr(row, key) for row in self.rows.get(arm, ())}
        return {seed: value for seed, value in found.items() if value is not None}

    def factor(self, key: str, arm: str, other: str, *, paired: bool = True) -> Factor | None:
        """How many times as large a number is in ``arm``."""
        return factor(self.values(arm, key), self.values(other, key), paired=paired)


def claims(evidence: Evidence, bench: Mapping[str, Any] | None = None) -> list[Claim]:
    """All claims, in the paper's order; ``bench`` is the result.json of ``fp8rl bench rollout``."""
    return [
        _brings_back(evidence, "fp8-tis", "TIS brings FP8 rollouts back to BF16's reward"),
        _brings_back(evidence, "fp8-mis", "MIS does so too"),
        _order(evidence),
        _larger(
            evidence,
            "Scales of 1.0 for the FP8 KV cache raise the mismatch: it needs calibration",
            ("kv-never", "fp8-tis"),
        ),
        _larger(
            evidence,
            "KV scales have to be measured in each step: those of version 0 raise the mismatch",
            ("kv-once", "fp8-tis"),
        ),
        _larger(
            evidence,
            "A mixture of experts mismatches more than a dense model",
            ("moe-fp8", "dense-fp8"),
            paired=False,
        ),
        _larger(
            evidence,
            "The router has to stay in BF16: rounding it to FP8 raises the mismatch",
            ("moe-fp8-router", "moe-fp8"),
        ),
        _larger(
            evidence,
            "Power-of-two block scales cost accuracy beside fp32 scales: they raise the mismatch",
            ("dense-fp8", "dense-fp32-scales"),
        ),
        _capacity(evidence),
        _throughput(bench),
    ]


def markdown(found: Sequence[Claim]) -> str:
    """The claims as a table for a README."""
    lines = ["| FP8-RL claims | reproduced here | measured | arms |", "|---|---|---|---|"]
    for claim in found:
        arms = ", ".join(f"`{arm}`" for arm in claim.arms)
        lines.append(f"| {claim.claim} | {MARKS[claim.answer]} | {claim.measured} | {arms} |")
    return "\n".join(lines) + "\n"


def verdict_text(found: Verdict) -> str:
    """A verdict with its interval."""
    text = f"{found.word}, {found.difference:+.3f}"
    if found.low is None or found.high is None:
        return f"{text} (one seed)"
    return f"{text} [{found.low:+.3f}, {found.high:+.3f}]"


def factor_text(found: Factor) -> str:
    """A factor with its interval."""
    text = f"{found.factor:.3g} x"
    if found.low is None or found.high is None:
        return f"{text} (one seed)"
    return f"{text} [{found.low:.3g}, {found.high:.3g}]"


def _brings_back(evidence: Evidence, arm: str, claim: str) -> Claim:
    """Uncorrected FP8 is worse than BF16, and corrected FP8 the same; what is gained is shown."""
    arms = ("bf16", "fp8", arm)
    bare, corrected = (evidence.verdicts.get(name) for name in arms[1:])
    gained = judge(evidence.values(arm, "reward"), evidence.values("fp8", "reward"), 0.0)
    if bare is None or corrected is None or gained is None:
        return _not_measured(claim, arms)
    measured = (
        f"reward beside BF16: uncorrected {verdict_text(bare)}; corrected {verdict_text(corrected)}"
        f"; corrected beside uncorrected: {verdict_text(gained)}"
    )
    answer: Answer = "undecided"
    if bare.word in ("same", "better"):
        measured += "; uncorrected FP8 is not worse here, so there is nothing to bring back"
    elif bare.word == "worse" and corrected.word == "worse":
        answer = "not reproduced"
    elif bare.word == "worse" and corrected.word in ("same", "better"):
        answer = "reproduced"
    return Claim(claim, answer, measured, arms)


def _order(evidence: Evidence) -> Claim:
    claim = "Mismatch: FP8 in the rollout only > FP8 end to end > BF16"
    arms = ("dense-fp8", "dense-aligned", "dense-bf16")
    pairs = [evidence.factor("k3", a, b) for a, b in pairwise(arms)]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return _not_measured(claim, arms)
    answers = {_raised(pair) for pair in known}
    answer: Answer = "not reproduced" if "not reproduced" in answers else "undecided"
    if answers == {"reproduced"}:
        answer = "reproduced"
    measured = (
        f"k3 of rollout only {factor_text(known[0])} that of end to end, which is "
        f"{factor_text(known[1])} that of BF16"
    )
    return Claim(claim, answer, measured, arms)


def _larger(evidence: Evidence, claim: str, arms: tuple[str, str], *, paired: bool = True) -> Claim:
    """A claim that the first arm's mismatch is larger; with the rewards where they are judged."""
    found = evidence.factor("k3", *arms, paired=paired)
    if found is None:
        return _not_measured(claim, arms)
    rewards = [
        f"{arm} {verdict_text(verdict)}"
        for arm in arms
        if (verdict := evidence.verdicts.get(arm)) is not None
    ]
    measured = f"k3 {factor_text(found)}"
    if not paired:
        measured += " (two models, each with a warm-up of its own)"
    if rewards:
        measured += f"; reward beside its baseline: {'; '.join(rewards)}"
    return Claim(claim, _raised(found), measured, arms)


def _raised(found: Factor) -> Answer:
    """Whether a mismatch is larger, by an amount that matters."""
    if found.word == "larger" and found.factor >= LEAST_FACTOR:
        return "reproduced"
    if found.high is not None and found.high < LEAST_FACTOR:
        return "not reproduced"
    return "undecided"


def _capacity(evidence: Evidence) -> Claim:
    claim, arms = "An FP8 KV cache holds twice the tokens of a BF16 one", ("fp8-tis", "bf16")
    ours, theirs = (set(evidence.values(arm, "cache_tokens").values()) for arm in arms)
    if not ours or not theirs:
        return _not_measured(claim, arms)
    times = max(ours) / max(theirs)
    answer: Answer = "reproduced" if times >= LEAST_CAPACITY else "not reproduced"
    measured = (
        f"{max(ours):,.0f} against {max(theirs):,.0f} tokens in the same memory: {times:.3g} x"
    )
    return Claim(claim, answer, measured, arms)


def _throughput(bench: Mapping[str, Any] | None) -> Claim:
    claim = "FP8 makes rollouts faster, by 10 to 44 %"
    if bench is None:
        why = "runs this small spend no time on weights: `fp8rl bench rollout` measures it"
        return Claim(claim, "not measured", why, ())
    found: dict[str, list[Mapping[str, float]]] = {}  # arm -> its ratio at each point
    for name, measured in bench["ratios"].items():
        arm, named, _ = name.partition(THROUGHPUT)
        if named and arm in FASTER:
            found.setdefault(arm, []).append(measured)
    if not found:
        return Claim(claim, "not measured", f"the benchmark has none of {', '.join(FASTER)}", ())
    spans = (
        f"{arm} {min(r['median'] for r in each):.2f} to {max(r['median'] for r in each):.2f} x "
        f"BF16's tokens/s ({len(each)} points)"
        for arm, each in found.items()
    )
    fast = [r["median"] >= LEAST_SPEED and r["min"] >= 1 for each in found.values() for r in each]
    answer: Answer = "undecided"
    if all(fast) or not any(fast):
        answer = "reproduced" if all(fast) else "not reproduced"
    measured_there = f"{bench['device']}: {'; '.join(spans)}; {sum(fast)} of {len(fast)} are faster"
    return Claim(claim, answer, measured_there, ())


def _not_measured(claim: str, arms: tuple[str, ...]) -> Claim:
    return Claim(claim, "not measured", f"needs runs of the arms {', '.join(arms)}", arms)
