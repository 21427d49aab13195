"""What FP8 bought a run, and what it cost: memory, bytes, time.

The KV cache and the bytes of an update can be said from one run alone, against what BF16 would
have taken. Speed cannot: it takes a BF16 run beside it (``comparison.py``), on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp8rl.config.rollout import FP8_CACHE
from fp8rl.report.data import RunData
from fp8rl.report.page import Fact, Source
from fp8rl.report.words import mib, percent, show

BF16_BYTES = 2


def gains(run: RunData) -> list[Fact]:
    """What a run alone can say, most telling first."""
    return [*_cache(run), *_bytes(run), *_speed(run), *_cost(run)]


def bytes_of_a_token(config: Mapping[str, Any], precision: str) -> int:
    """What a token takes of the KV cache in a precision, all layers together."""
    model = config["model"]
    numbers = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"]
    return int(numbers) * (1 if precision in FP8_CACHE else BF16_BYTES)


def _cache(run: RunData) -> list[Fact]:
    series = run.series("rollout/kv_cache_tokens")
    if series.last is None:
        return []
    token, bf16 = (bytes_of_a_token(run.config, p) for p in (run.last_precision, "bf16"))
    tokens = f"{series.last:,.0f}"
    source = Source(
        "How many tokens of full-length requests the engine's KV cache holds at once; FP8 halves "
        "the bytes of a token, so that the same memory holds twice as many.",
        "bytes of a token = 2 x layers x KV heads x head size x bytes of a number (1 or 2)",
        (series.key,),
        "the last step",
        "tokens: the engine's own count; bytes and how many times: by arithmetic",
    )
    if run.last_precision not in FP8_CACHE:
        remark = f"{token:,} bytes a token, in BF16"
        return [Fact(tokens, "tokens of KV cache", remark, source)]
    remark = f"{tokens} tokens, {token:,} bytes each; {bf16:,} in BF16"
    times = f"{bf16 / token:g}\u00d7"
    return [Fact(times, "tokens in the same KV-cache memory", remark, source)]


def _bytes(run: RunData) -> list[Fact]:
    sent, bf16 = run.series("sync/bytes").last, run.series("sync/bf16_bytes").last
    if not sent or not bf16:
        return []
    source = Source(
        "What a weight update sends, against the same tensors in BF16.",
        "sync/bytes / sync/bf16_bytes",
        ("sync/bytes", "sync/bf16_bytes"),
        "the last update",
    )
    remark = f"{mib(sent)} where BF16 takes {mib(bf16)}"
    return [Fact(percent(sent / bf16), "of BF16's bytes in each weight update", remark, source)]


def _speed(run: RunData) -> list[Fact]:
    speed, step = run.series("rollout/tokens_per_second"), run.series("time/step")
    if not speed:
        return []
    remark = (
        f"{show(speed.median, ',.0f')} tokens/s and {show(step.mean, '.2f')} s a step here; to "
        "compare, run it in BF16 too"
    )
    source = Source(
        "One run cannot say what FP8 does to speed. Measure it on the same machine: fp8rl train "
        "CONFIG --precision bf16 run_dir=BF16_RUN, then fp8rl report THIS_RUN BF16_RUN.",
        "median tokens sampled a second; mean seconds of a step",
        (speed.key, step.key),
        speed.over,
    )
    if run.precision == "bf16":
        return [Fact(show(speed.median, ",.0f"), "rollout tokens/s", "median", source)]
    return [Fact("?", "rollout speed against BF16: not measured", remark, source)]


def _cost(run: RunData) -> list[Fact]:
    step = run.series("time/step").total
    spent = sum(run.series(f"time/{phase}").total or 0.0 for phase in ("observe", "publish"))
    if not step:
        return []
    sync, sampled = run.series("sync/seconds").median, len(run.series("sync/seconds"))
    source = Source(
        "The share of the run's time that goes into measuring KV scales, quantizing, sending, "
        "loading and reading back.",
        "sum of time/observe and time/publish / sum of time/step",
        ("time/observe", "time/publish", "time/step"),
        f"{sampled} updates",
    )
    ms = show(None if sync is None else 1000 * sync, ".0f", " ms")
    remark = f"median update {ms}, proof included"
    return [Fact(percent(spent / step), "of the time spent on weights and scales", remark, source)]
