"""What each metric of metrics.jsonl means, how it is computed, and in which file.

``definition`` gives the source of a metric by its name, ``groups`` sorts names for a page. A name
that is not listed is said to be undefined here: a test holds the list against a real run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fp8rl.report.page import Source

UNDEFINED = "Not defined in this version's glossary."
METRICS = "correction/metrics.py"
GROUPS = (
    ("Reward", r"reward/|response/"),
    ("Mismatch and correction", r"rollout_corr/|training/"),
    ("Policy and loss", r"policy/|actor/|loss$|grad_norm$|learning_rate"),
    ("Router", r"router/"),
    ("Drift", r"drift/"),
    ("KV cache", r"kv"),
    ("Weight sync", r"sync/"),
    ("Rollout", r"rollout/"),
    ("Time", r"time/"),
    ("Other", r""),
)
# name (a pattern) -> what it means, formula, where it is computed
DEFINITIONS: tuple[tuple[str, str, str, str], ...] = (
    ("reward/train", "Mean reward of the step's rollout batch.", "", "fp8rl/loop.py"),
    (
        "reward/heldout",
        "Mean reward of one sampled response for each prompt never trained on.",
        "",
        "fp8rl/loop.py",
    ),
    (
        "reward/heldout_trainer",
        "Expected reward of the trainer's own policy on those prompts, without sampling.",
        "mean probability of the one right answer",
        "fp8rl/loop.py",
    ),
    ("response/mean_length", "Mean tokens of a response.", "", "fp8rl/loop.py"),
    (
        r"rollout_corr/kl(_.*)?",
        "KL(rollout || trainer), k1 estimate; may be negative.",
        "mean(-log r)",
        METRICS,
    ),
    (
        r"rollout_corr/k3_kl(_.*)?",
        "KL(rollout || trainer), k3 estimate; never negative.",
        "mean(r - 1 - log r)",
        METRICS,
    ),
    (
        "rollout_corr/token_mult_prob_error",
        "By what factor a token's two probabilities differ; 1 is none.",
        "mean exp|log r|",
        METRICS,
    ),
    (
        "rollout_corr/chi2_token",
        "Chi-squared divergence, from tokens.",
        "mean(r^2) - 1",
        METRICS,
    ),
    (
        "rollout_corr/chi2_seq",
        "Chi-squared divergence, from whole responses.",
        "mean over responses of (product of r)^2, - 1",
        METRICS,
    ),
    ("rollout_corr/log_ratio_abs_max", "The largest difference.", "max |log r|", METRICS),
    (
        r"rollout_corr/(training|rollout)_(log_)?ppl",
        "Perplexity of the responses under the trainer or the engine.",
        "mean over responses of exp(-mean log p); log_: without the exp",
        METRICS,
    ),
    (
        r"rollout_corr/(log_ppl_(abs_)?diff(_max|_min)?|ppl_ratio)",
        "The two perplexities of a response against each other.",
        "of -mean log p: difference trainer - rollout; ppl_ratio: mean exp of it",
        METRICS,
    ),
    (
        r"rollout_corr/rollout_is_ratio_fraction_(high|low)",
        "Share of response tokens whose ratio is out of the weighting's bounds.",
        "",
        METRICS,
    ),
    (
        r"rollout_corr/rollout_is_raw_.*",
        "Importance ratios before truncation, over all response tokens.",
        "mean, std, min, max; eff_sample_size = (sum r)^2 / (n sum r^2)",
        METRICS,
    ),
    (
        r"rollout_corr/(rollout_is_.*|eff_sample_size_.*)",
        "Importance weights as the loss takes them, over kept tokens.",
        "mean, std, min, max; eff_sample_size = (sum w)^2 / (n sum w^2)",
        METRICS,
    ),
    (
        r"rollout_corr/rollout_rs_.*",
        "Share of response tokens, or of responses touched (seq), that left the loss.",
        "",
        METRICS,
    ),
    (
        r"rollout_corr/tokens_.*",
        "Response tokens at these positions, or of this age in versions.",
        "",
        "correction/groups.py",
    ),
    (
        r"training/rollout_.*",
        "Probabilities of the sampled tokens: trainer against engine.",
        "|p_train - p_rollout|: mean, std, max; and their Pearson correlation",
        METRICS,
    ),
    (
        "policy/entropy",
        "Entropy of the trainer's policy on the rollout.",
        "mean over response tokens, nats",
        "fp8rl/trainer/learning.py",
    ),
    (
        "policy/mastered_fraction",
        "Share of response tokens left out because the policy has mastered them.",
        "",
        "fp8rl/trainer/learning.py",
    ),
    (
        r"(policy/clip_fraction_(high|low)|actor/pg_clipfrac(_lower)?)",
        "Share of kept tokens whose step the loss clipped.",
        "",
        "correction/losses.py",
    ),
    (
        r"policy/ratio_(mean|max)",
        "Ratio of the policy being stepped to the policy scored.",
        "exp(log p_now - log p_old)",
        "correction/losses.py",
    ),
    (
        "actor/ppo_kl",
        "How far the step's optimizer steps moved the policy.",
        "mean(log p_old - log p_now)",
        "correction/losses.py",
    ),
    ("loss", "The policy loss, mean over the step's minibatches.", "", "correction/losses.py"),
    (
        "grad_norm",
        "Norm of the gradient before clipping, mean over the step's minibatches.",
        "",
        "fp8rl/trainer/megatron.py",
    ),
    (
        r"router/.*",
        "Choices of experts in which the engine's and the trainer's router agree.",
        "|top-k of both| / k, mean over tokens; top1: first choices alone",
        "fp8rl/loop.py",
    ),
    ("drift/tokens", "Tokens of the probe of engine against trainer.", "", "fp8rl/drift/probe.py"),
    (
        "drift/warnings",
        "Thresholds of the drift watch that this probe passes.",
        "",
        "fp8rl/drift/watch.py",
    ),
    (
        "drift/answered",
        "Whether this step did something about drift: measured KV scales anew, or tightened.",
        "1 or 0",
        "fp8rl/drift/answer.py",
    ),
    (
        "drift/precision",
        "What the step's engine had in FP8, where drift is answered by falling back.",
        "",
        "fp8rl/loop.py",
    ),
    (
        "drift/fall_back",
        "Why the next step starts a new engine with less in FP8.",
        "",
        "fp8rl/drift/answer.py",
    ),
    (
        "drift/logprob",
        "Log-probs of engine against trainer on the probe.",
        "mean |log p_engine - log p_trainer|, at temperature 1",
        "fp8rl/drift/parts.py",
    ),
    (
        "drift/head",
        "What the engine's last norm and head do otherwise, given the same stream.",
        "mean |log p_engine - log p|",
        "fp8rl/drift/parts.py",
    ),
    (
        "drift/embedding",
        "Embedding of engine against trainer.",
        "rms(difference) / rms(trainer's)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/total",
        "Residual stream of engine against trainer after this layer.",
        "rms(difference) / rms(trainer's)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/own",
        "What this layer of the engine does otherwise than the trainer's, given the same stream.",
        "rms(difference) / rms(what the layer adds)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/(weights|activations|cache)",
        "What rounding these as the engine does changes in this layer of the trainer.",
        "rms(change) / rms(what the layer adds)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/unexplained",
        "What no rounding explains of this layer: the order of sums, or a fault of the engine.",
        "rms(engine - trainer with all roundings) / rms(what the layer adds)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/router",
        "What comes of tokens that go to other experts, in place of the other parts.",
        "rms(their differences) / rms(what the layer adds)",
        "fp8rl/drift/parts.py",
    ),
    (
        r"drift/\d+/misrouted",
        "Choices of the engine's router that are not its model's, given the same stream.",
        "1 - |top-k of both| / k, mean over tokens",
        "fp8rl/drift/parts.py",
    ),
    ("kv/tokens", "Tokens on which the KV scales were measured.", "", "fp8rl/calibration.py"),
    ("kv/changed", "KV scales that differ from the step before.", "", "fp8rl/calibration.py"),
    (
        "kv/saturation_max",
        "The largest saturation of any layer's q, k or v.",
        "",
        "fp8rl/calibration.py",
    ),
    (
        r"kv_scale/\d+/[qkv]",
        "The scale that the engine served with.",
        "amax x margin / 448, rounded up to a power of two unless configured otherwise",
        "quant/kv_scales.py",
    ),
    (
        r"kv_saturation/\d+/[qkv]",
        "Share of elements that the scale clips.",
        "|x| > 448 x scale",
        "quant/kv_observation.py",
    ),
    (
        r"kv_underflow/\d+/[qkv]",
        "Share of elements, not 0, that the scale rounds to 0.",
        "",
        "quant/kv_observation.py",
    ),
    (
        r"sync/(bf16_)?bytes",
        "Bytes of a weight update; bf16_: of the same tensors in BF16.",
        "",
        "sync/publisher.py",
    ),
    (
        r"sync/.*seconds",
        "Time of a weight update: quantizing, and the engine's part with its proof.",
        "seconds = quantize_seconds + engine_seconds; kv_seconds: measuring scales in the engine",
        "sync/publisher.py",
    ),
    ("rollout/tokens", "Tokens sampled in the step.", "", "fp8rl/loop.py"),
    (
        "rollout/tokens_per_second",
        "Tokens sampled, by the time of the rollout phase.",
        "",
        "fp8rl/loop.py",
    ),
    (
        "rollout/kv_cache_tokens",
        "Tokens that the engine's KV cache holds.",
        "",
        "the engine's own count",
    ),
    (
        r"rollout/(segments|unfinished|mean_age|max_age)",
        "Calls of the engine; responses that go on in the next step; age of tokens in versions.",
        "",
        "fp8rl/segments.py",
    ),
    (r"time/.*", "Seconds of a phase of the step; step: of all of them.", "", "fp8rl/progress.py"),
)


def definition(name: str) -> Source:
    """What the metric ``name`` means."""
    for pattern, what, formula, where in DEFINITIONS:
        if re.fullmatch(pattern, name):
            return Source(what, formula, (name,), reference=where)
    return Source(UNDEFINED, keys=(name,))


def groups(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names by the group that they belong to, in the order of a page; empty groups are left out."""
    held: dict[str, list[str]] = {title: [] for title, _ in GROUPS}
    for name in names:
        title = next(title for title, pattern in GROUPS if re.match(pattern, name))
        held[title].append(name)
    return [(title, found) for title, found in held.items() if found]
