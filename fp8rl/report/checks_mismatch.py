"""Checks of the mismatch: how far the policy that sampled is from the one that learns.

probabilities   exp|dlogp|
divergence      k3, its level and whether it grows
corrected       the share of tokens whose weight was cut or that were rejected, at least
sample_size     what the weights leave of the batch
routers         whether engine and trainer choose the same experts (MoE)
"""

from __future__ import annotations

from collections.abc import Iterator

from fp8rl.report.check import OURS, Check, below, level, worse
from fp8rl.report.data import RunData, Series
from fp8rl.report.page import Source, State
from fp8rl.report.statistics import growth
from fp8rl.report.words import percent

EXP_ABS = (1.03, 1.05)  # good below, bad above
K3 = (2e-3, 1e-2)
CORRECTED = (0.01, 0.1)
SAMPLE_SIZE = (0.5, 0.3)  # good from, bad under
AGREEMENT = 0.9
GROWTH_P, GROWTH_FACTOR = 0.01, 2.0

NVIDIA = (
    "NVIDIA's blog on FP8 in NeMo-RL takes 1.03 to 1.05 for acceptable; most of NeMo-RL's nightly "
    "tests ask for less than 1.05"
)
NEMO_K3 = (
    "NeMo-RL's GRPO guide: about 1e-3 is usual; its nightly tests bound it by 0.002 or less for "
    "most models, by 0.01 at the widest"
)
VERL = "veRL's rollout-correction guide"
CUT = "rollout_corr/rollout_is_ratio_fraction_high"
REJECTED = "rollout_corr/rollout_rs_masked_fraction"


def probabilities(run: RunData) -> Iterator[Check]:
    """Mean exp|log p_train - log p_rollout|, median of the steps: one token can make a step's."""
    series = run.series("rollout_corr/token_mult_prob_error")
    good, bad = EXP_ABS
    state: State = "unknown"
    found = "not measured"
    if series.median is not None and series.recent.median is not None:
        level = max(series.median, series.recent.median)
        state = "good" if level < good else "watch" if level <= bad else "bad"
        over = sum(value > bad for value in series.values)
        found = f"{level:.4f}" + (f"; above {bad} in {over} of {len(series)} steps" if over else "")
    yield Check(
        "Mismatch of probabilities",
        state,
        found,
        f"below {good} (not above {bad})",
        Source(
            "By what factor trainer and engine differ on a sampled token's probability; 1 is none.",
            "median over steps, or over the last fifth of them if that is higher, of the mean over "
            "response tokens of exp |log p_train - log p_rollout|",
            (series.key,),
            series.over,
            NVIDIA,
        ),
    )


def divergence(run: RunData) -> Iterator[Check]:
    """The k3 estimate of KL(rollout || trainer), and whether it grows."""
    series = run.series("rollout_corr/k3_kl")
    formula = (
        "mean over steps, or over the last fifth of them if that is higher, of the mean over "
        "response tokens of r - 1 - log r, r = p_train / p_rollout"
    )
    yield Check(
        "Mismatch KL (k3)",
        below(series, *K3),
        level(series, lambda value: f"{value:.2g}"),
        f"below {K3[0]:g} nats (not above {K3[1]:g})",
        Source(
            "The divergence of the policy that learns from the policy that sampled.",
            formula,
            (series.key,),
            series.over,
            NEMO_K3,
        ),
    )
    trend = growth(series.steps, series.values)
    state: State = "unknown"
    found = f"{len(series)} steps are too few to tell"
    if trend is not None:
        grows = trend.p < GROWTH_P and trend.factor > GROWTH_FACTOR
        state = "watch" if grows else "good"
        found = f"{trend.factor:.2g}\u00d7 from first to last step, p = {trend.p:.2g}"
        found += ": growing" if grows else ": not growing"
    yield Check(
        "Mismatch over time",
        state,
        found,
        f"p at least {GROWTH_P:g}, or less than {GROWTH_FACTOR:g}\u00d7",
        Source(
            "Whether k3 grows from step to step, as it does before a collapse.",
            "Kendall's rank test of k3 against the step, two-sided; growth is exp(slope x span) "
            "with the Theil-Sen slope of log k3",
            (series.key,),
            series.over,
            f"{OURS}; growth before collapse: Liu, Li et al., When Speed Kills Stability",
        ),
    )


def touched(run: RunData) -> Series:
    """At each step the share of tokens truncated or rejected, at least: the larger of both.

    They overlap: with MIS every token above the bound is rejected, with a rejection beside TIS some
    may be. Where one of the two acts alone, the share is exact.
    """
    found: dict[int, float] = {}
    for series in (run.series(CUT), run.series(REJECTED)):
        for step, value in zip(series.steps, series.values, strict=True):
            found[step] = max(value, found.get(step, value))
    steps = sorted(found)
    return Series(CUT, tuple(steps), tuple(found[step] for step in steps))


def corrected(run: RunData) -> Iterator[Check]:
    """The share of tokens that the correction touched."""
    if not run.config["correction"].get("stages", True):
        return  # nothing is corrected: nothing can be cut
    series = touched(run)
    yield Check(
        "Tokens corrected",
        below(series, *CORRECTED),
        level(series, percent),
        f"below {percent(CORRECTED[0])} (not above {percent(CORRECTED[1])})",
        Source(
            "How often the correction had to step in, at least.",
            "at each step the larger of two shares of response tokens, which overlap: those whose "
            "ratio is above the cap, and those rejected",
            (CUT, REJECTED),
            series.over,
            f"watch: {OURS}; bad: {VERL} warns where more than 0.1 is vetoed",
        ),
    )


def sample_size(run: RunData) -> Iterator[Check]:
    """Effective sample size of the importance weights."""
    series = run.series("rollout_corr/rollout_is_eff_sample_size")
    good, bad = SAMPLE_SIZE
    low = worse(series, min)
    state: State = "unknown"
    if low is not None:
        state = "good" if low >= good else "watch" if low >= bad else "bad"
    yield Check(
        "Effective sample size",
        state,
        "not measured" if low is None else f"{low:.3f} of 1",
        f"at least {good} (not under {bad})",
        Source(
            "How much of the batch still counts once its tokens are weighted.",
            "(sum w)^2 / (n sum w^2) over kept tokens, w the weight that the loss takes",
            (series.key,),
            series.over,
            f"{VERL}: warns under 0.3; half of the batch: {OURS}",
        ),
    )


def routers(run: RunData) -> Iterator[Check]:
    """Engine and trainer choose the same experts (MoE)."""
    series = run.series("router/agreement")
    if not series:
        return
    low = worse(series, min)
    assert low is not None  # the series has values
    yield Check(
        "Router agreement",
        "good" if low >= AGREEMENT else "watch",
        percent(low),
        f"at least {percent(AGREEMENT)}",
        Source(
            "Whether the engine's and the trainer's routers send a token to the same experts.",
            "mean over tokens and layers of |top-k of both| / k",
            (series.key,),
            series.over,
            "arXiv 2510.11370: some 10 % of choices differ between engine and trainer in BF16",
        ),
    )
