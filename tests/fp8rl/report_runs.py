"""Made-up runs whose reports are known beforehand, and a reader of pages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fp8rl.config.file import dump_config
from fp8rl.config.run import RunConfig
from fp8rl.run_dir import RunDir

Metrics = dict[str, float | int | str]
Change = Callable[[int, Metrics], Mapping[str, float | int | str]]

COMMAND = "fp8rl train examples/grpo.yaml 'run_dir=runs/<b>'"
LAYERS, STEPS = 4, 20
VOID = {"meta", "link", "br"}


def step_metrics(step: int, rng: random.Random) -> Metrics:
    """One step of a run in which all is well."""
    metrics: Metrics = {
        "step": step,
        "version": step,
        "reward/train": 0.2 + 0.75 / (1 + math.exp(8 - step)) + rng.gauss(0, 0.02),
        "rollout_corr/k3_kl": 1e-3 * math.exp(rng.gauss(0, 0.3)),
        "rollout_corr/token_mult_prob_error": 1 + 0.02 * math.exp(rng.gauss(0, 0.1)),
        "rollout_corr/rollout_is_ratio_fraction_high": 0.0008,
        "rollout_corr/rollout_rs_masked_fraction": 0.0,
        "rollout_corr/rollout_is_eff_sample_size": 0.998,
        "sync/bytes": 3_456_000,
        "sync/bf16_bytes": 6_912_000,
        "sync/seconds": 0.001 * (50 + step),
        "rollout/tokens_per_second": 5000.0 + 10 * step,
        "rollout/kv_cache_tokens": 4096,
        "grad_norm": 0.5 + rng.gauss(0, 0.05),
        "time/observe": 0.05,
        "time/rollout": 0.75,
        "time/train": 1.0,
        "time/step": 1.8,
    }
    for layer in range(LAYERS):
        metrics |= {f"kv_scale/{layer}/{kind}": 2.0**-layer for kind in "qkv"}
    metrics |= {"kv/saturation_max": 2e-5 if step == 7 else 0.0, "kv/changed": int(step > 18)}
    if step % 5 == 0:
        metrics |= {"reward/heldout": step / 25, "time/eval": 2.0}
    return metrics


def run_metrics(steps: int = STEPS, seed: int = 0) -> list[Metrics]:
    """A whole run, with an evaluation before the first step."""
    rng = random.Random(seed)
    start = {"step": 0, "version": 0, "sync/seconds": 0.05}
    start |= {"reward/heldout": 0.1, "time/eval": 2.0}
    return [start, *(step_metrics(step, rng) for step in range(1, steps + 1))]


def make_run(
    folder: Path, *, change: Change = lambda step, line: {}, steps: int = STEPS, **config: Any
) -> RunDir:
    """A run's folder; ``change`` gives what differs in a step (None: the key is left out)."""
    run = RunDir.create(folder, dump_config(RunConfig(**{"steps": STEPS, **config})))
    for line in run_metrics(steps, seed=config.get("seed", 0)):
        merged = line | dict(change(int(line["step"]), line))
        run.append({key: value for key, value in merged.items() if value is not None})
    return run


class PageText(HTMLParser):
    """The text of a page, and that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
