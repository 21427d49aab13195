"""The claims table says what the numbers allow, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fp8rl.report.equivalence import judge
from fp8rl.stability.claims import Claim, Evidence, claims, markdown
from fp8rl.stability.measure import Measured

NOISE = (0.01, -0.01, 0.005, -0.005, 0.0)
NOTHING = dict.fromkeys(
    ("exp_abs", "ess", "truncated", "rejected", "clipped", "gradient", "entropy", "saturation")
)


def arm(name: str, reward: float, k3: float, cache: float | None = None) -> list[Measured]:
    """Five runs of an arm, with some noise."""
    return [
        Measured(
            arm=name,
            seed=seed,
            steps=10,
            reward=reward + noise,
            engine_reward=reward,
            area=reward,
            k3=k3 * (1 + 10 * noise),
            cache_tokens=cache,
            broke=None,
            collapse=None,
            **NOTHING,
        )
        for seed, noise in enumerate(NOISE)
    ]


def table(*arms: list[Measured], bench: Any = None) -> dict[str, Claim]:
    """The claims of a study whose baseline is bf16, by their first words."""
    rows = {runs[0].arm: runs for runs in arms}
    rewards = {name: {r.seed: r.reward for r in runs} for name, runs in rows.items()}
    verdicts = {
        name: found
        for name, values in rewards.items()
        if name != "bf16" and (found := judge(values, rewards["bf16"], 0.03)) is not None
    }
    return {c.claim.split()[0]: c for c in claims(Evidence(rows, verdicts), bench)}


BF16, TIS = arm("bf16", 0.8, 1e-5, cache=1000), arm("fp8-tis", 0.8, 1e-3)
DENSE, DENSE_BF16 = arm("dense-fp8", 0.8, 1e-3), arm("dense-bf16", 0.8, 1e-5)


@pytest.mark.parametrize(
    ("bare", "corrected", "answer"),
    [
        (0.5, 0.8, "reproduced"),
        (0.5, 0.6, "not reproduced"),
        (0.79, 0.8, "undecided"),  # a difference that does not matter
        (0.8, 0.8, "undecided"),  # nothing to bring back
    ],
)
def test_tis_brings_back_what_uncorrected_fp8_loses(
    bare: float, corrected: float, answer: str
) -> None:
    found = table(BF16, arm("fp8", bare, 1e-3), arm("fp8-tis", corrected, 1e-3))["TIS"]
    assert found.answer == answer
    assert found.arms == ("bf16", "fp8", "fp8-tis")
    assert ("nothing to bring back" in found.measured) == (bare > 0.7)


def test_what_may_be_worse_than_bf16_is_not_brought_back_however_much_is_gained() -> None:
    wide = [replace(run, reward=0.7 + 20 * n) for run, n in zip(TIS, NOISE, strict=True)]
    found = table(BF16, arm("fp8", 0.4, 1e-3), wide)["TIS"]
    assert found.answer == "undecided"
    assert "corrected undecided, -0.100" in found.measured
    assert "corrected beside uncorrected: better, +0.300" in found.measured


@pytest.mark.parametrize(
    ("aligned", "answer"),
    [(1e-4, "reproduced"), (2e-3, "not reproduced"), (1e-3, "not reproduced")],
)
def test_the_order_of_mismatches(aligned: float, answer: str) -> None:
    found = table(DENSE, arm("dense-aligned", 0.8, aligned), DENSE_BF16, BF16)["Mismatch:"]
    assert found.answer == answer


def test_mismatches_are_compared_by_factors_with_intervals() -> None:
    found = table(BF16, TIS, arm("kv-never", 0.8, 3e-3))["Scales"]
    assert found.answer == "reproduced"
    assert "k3 3 x [3, 3]" in found.measured
    assert table(BF16, TIS, arm("kv-never", 0.8, 1.02e-3))["Scales"].answer == "not reproduced"
    assert table(BF16, TIS, arm("kv-never", 0.8, 1e-3))["Scales"].answer == "not reproduced"
    assert "kv-never same" in found.measured
    less = table(BF16, DENSE, arm("moe-fp8", 0.8, 1e-4))["A"]
    assert less.answer == "not reproduced"


@pytest.mark.parametrize(("tokens", "answer"), [(2000, "reproduced"), (1200, "not reproduced")])
def test_capacity_is_counted(tokens: float, answer: str) -> None:
    found = table(BF16, arm("fp8-tis", 0.8, 1e-3, cache=tokens))["An"]
    assert found.answer == answer
    assert f"{tokens:,.0f} against 1,000 tokens" in found.measured


@pytest.mark.parametrize(
    ("one", "other", "answer"),
    [(1.3, 1.2, "reproduced"), (1.3, 0.9, "undecided"), (1.02, 0.8, "not reproduced")],
)
def test_throughput_comes_from_all_points_of_fp8_in_the_benchmark(
    one: float, other: float, answer: str
) -> None:
    first, second = ({"median": r, "min": r - 0.1, "max": r + 0.1} for r in (one, other))
    ratios = {
        "fp8-kv / bf16, tokens/s, batch 1": first,
        "fp8 / bf16, tokens/s, batch 8": second,
        "kv-only / bf16, tokens/s, batch 1": {**first, "median": 5.0},
        "fp8-w8a8 / bf16, tokens/s, batch 1": {**first, "median": 0.1},
        "fp8-kv / bf16, KV tokens in the same KV bytes": {**first, "median": 9.0},
    }
    found = table(BF16, bench={"device": "H100", "ratios": ratios})["FP8"]
    assert found.answer == answer
    assert found.measured.startswith(f"H100: fp8-kv {one:.2f} to {one:.2f} x BF16's tokens/s")


def test_what_was_not_measured_is_said_to_be_so() -> None:
    found = table(BF16)
    assert {claim.answer for claim in found.values()} == {"not measured"}
    assert "kv-once, fp8-tis" in found["KV"].measured
    lines = markdown(list(found.values())).splitlines()
    assert len(lines) == 2 + len(found)
    assert all(line.count(" | ") == 3 for line in lines[2:])
