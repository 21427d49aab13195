"""How far rollout and training policies are apart, and what the correction did about it.

With `lr = log p_train - log p_rollout`, `r = exp(lr)`, over unmasked tokens sampled by the rollout
policy; by veRL's names where it has them, all under `rollout_corr/`. Unlike veRL's, `rollout_is_*`
are of the weights as the loss takes them, at every level and after normalization, and fractions are
of tokens:

    kl = mean(-lr), k3_kl = mean(r - 1 - lr)       both estimate KL(rollout || train); k3 is >= 0
    chi2_token = mean(r^2) - 1                     chi2_seq: of sequence ratios, over sequences
    training_ppl, rollout_ppl = mean over sequences of exp(-mean log p); ppl_ratio = mean of ratios
    token_mult_prob_error = mean(exp |lr|)         NeMo-RL's
    rollout_is_*: of the weights as applied, over kept tokens; rollout_is_raw_*: of the ratios at
        the weighting's level before truncation, over all tokens
    eff_sample_size = (sum w)^2 / (n sum w^2)      in (0, 1]; 0 only if every weight is 0
    ratio_fraction_high, _low: share of tokens whose raw ratio is out of the weighting's bounds
    rollout_rs_*masked_fraction: share of tokens, or sequences touched, that left the loss

k1 and k3 are Schulman's estimators (joschu.net/blog/kl-approx.html). Log-ratios are clamped to +-20
but for k1: every number is finite. Under `training/` are the probabilities' own: difference and
correlation.
"""

import math
from collections.abc import Sequence

from fp8rl.correction.errors import LogProbError, MaskError
from fp8rl.correction.stages import Rejection, Stage
from fp8rl.correction.statistics import Statistics

PREFIX = "rollout_corr/"


def correction_metrics(stages: Sequence[Stage], statistics: Statistics) -> dict[str, float]:
    """The metrics that these statistics stand for; waits for the device once.

    Raises:
        MaskError: there were no tokens.
        LogProbError: a log-prob was unusable.
    """
    sums, maxima = statistics.read()
    for name in ("train", "rollout"):
        if sums[f"unusable_{name}"]:
            raise LogProbError(
                f"{name}_logprobs: an unmasked value is NaN, infinite or positive; expected finite "
                "log-probabilities (at most 0): mask positions that were not sampled, and pass "
                "log-probs of the sampled tokens"
            )
    if sums["tokens"] == 0:
        raise MaskError("mask: selects no token, so there is no mismatch to measure")
    named = _divergences(sums, maxima) | _perplexities(sums, maxima)
    named |= _weights(sums, maxima) | _rejections(stages, sums)
    return {PREFIX + name: value for name, value in named.items()} | _probabilities(sums, maxima)


def _divergences(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    n = sums["tokens"]
    return {
        "kl": -sums["log_ratio"] / n,
        "k3_kl": sums["k3"] / n,
        "chi2_token": sums["ratio_squared"] / n - 1,
        "chi2_seq": sums["squared_sequence_ratio"] / sums["sequences"] - 1,
        "token_mult_prob_error": sums["exp_abs"] / n,
        "log_ratio_abs_max": maxima["abs_log_ratio"],
    }


def _perplexities(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    n = sums["sequences"]
    return {
        "training_ppl": sums["train_ppl"] / n,
        "training_log_ppl": sums["train_log_ppl"] / n,
        "rollout_ppl": sums["rollout_ppl"] / n,
        "rollout_log_ppl": sums["rollout_log_ppl"] / n,
        "log_ppl_diff": sums["log_ppl_diff"] / n,
        "log_ppl_abs_diff": sums["log_ppl_abs_diff"] / n,
        "log_ppl_diff_max": maxima["log_ppl_diff"],
        "log_ppl_diff_min": -maxima["negative_log_ppl_diff"],
        "ppl_ratio": sums["ppl_ratio"] / n,
    }


def _weights(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    tokens, kept = sums["tokens"], sums["kept"]
    named = {
        "rollout_is_ratio_fraction_high": sums["raw_high"] / tokens,
        "rollout_is_ratio_fraction_low": sums["raw_low"] / tokens,
    }
    named |= _moments("rollout_is_raw", tokens, sums["raw"], sums["raw_squared"])
    named |= {
        "rollout_is_raw_max": maxima["raw"],
        "rollout_is_raw_min": -maxima["negative_raw"],
    }
    if kept == 0:  # nothing is left to describe
        return named
    named |= _moments("rollout_is", kept, sums["weight"], sums["weight_squared"])
    return named | {
        "rollout_is_max": maxima["weight"],
        "rollout_is_min": -maxima["negative_weight"],
    }


def _moments(name: str, n: float, first: float, second: float) -> dict[str, float]:
    """Mean, standard deviation and effective sample size from the sums of `n` numbers."""
    mean, mean_square = first / n, second / n
    return {
        f"{name}_mean": mean,
        f"{name}_std": math.sqrt(max(0.0, mean_square - mean**2)),
        # at most 1 by Cauchy-Schwarz; min() takes the last rounding
        f"{name}_eff_sample_size": min(1.0, mean**2 / mean_square) if second > 0 else 0.0,
    }


def _rejections(stages: Sequence[Stage], sums: dict[str, float]) -> dict[str, float]:
    tokens, sequences = sums["tokens"], sums["sequences"]
    named = {
        "rollout_rs_masked_fraction": (tokens - sums["kept"]) / tokens,
        "rollout_rs_seq_masked_fraction": sums["touched_sequences"] / sequences,
    }
    for stage in stages:
        if isinstance(stage, Rejection):
            name = f"rollout_rs_{stage.name}"
            named[f"{name}_masked_fraction"] = sums[f"rejected_{stage.name}_tokens"] / tokens
            named[f"{name}_seq_masked_fraction"] = (
                sums[f"rejected_{stage.name}_sequences"] / sequences
            )
    return named


def _probabilities(sums: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """Of p_train and p_rollout of the sampled tokens; the correlation of a constant is absent."""
    n = sums["tokens"]
    mean = sums["prob_diff"] / n
    named = {
        "training/rollout_probs_diff_max": maxima["prob_diff"],
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_std": math.sqrt(
            max(0.0, sums["prob_diff_squared"] / n - mean**2)
        ),
    }
    p, q = sums["p"] / n, sums["q"] / n
    variances = (sums["pp"] / n - p**2) * (sums["qq"] / n - q**2)
    if variances > 1e-20:
        correlation = (sums["pq"] / n - p * q) / math.sqrt(variances)
        named["training/rollout_actor_probs_pearson_corr"] = max(-1.0, min(1.0, correlation))
    return named
