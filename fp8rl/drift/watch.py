"""The drift watch of a run: every so many steps a probe, and a warning where a layer drifts off.

A probe (``probe.py``) says for each layer how far engine and trainer are apart, and why
(``parts.py``). What the engine's roundings explain is the price of FP8, and known; what they
do not is small, or something is wrong in the engine: a kernel, a buffer, weights that changed after
they were proven. A threshold that is passed is told once, with the layers and what to do, and again
only after a probe that found it kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.run import RunConfig
from fp8rl.drift.probe import Probe
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.quant import KVScales, QuantPlan
from fp8rl.run_dir import Metrics
from fp8rl.trainer.megatron import MegatronTrainer

# what a metric's last name is held against, what it is a measure of, and what to do about it
FAULT = (
    "the engine computes something else than its weights and scales say; restart it, and if it "
    "stays, look at its kernels"
)
LIMITS = {
    "unexplained": ("warn_unexplained", "of what the layer adds is unexplained", FAULT),
    "embedding": ("warn_unexplained", "of the embedding differs", FAULT),
    "head": ("warn_unexplained", "nats are lost in the last norm and the head", FAULT),
    "weights": (
        "warn_rounding",
        "of what the layer adds is lost by rounding its weights",
        "keep its linears in BF16, or train with trainer.precision=fp8-aligned",
    ),
    "activations": (
        "warn_rounding",
        "of what the layer adds is lost by rounding the input of its linears",
        "keep its linears in BF16, or train with trainer.precision=fp8-aligned",
    ),
    "cache": (
        "warn_rounding",
        "of what the layer adds is lost in the KV cache",
        "recalibrate (kv_scales.recalibrate=every-step, more kv_scales.calibration_tokens), or "
        "serve with a BF16 cache (rollout.precision)",
    ),
    "misrouted": (
        "warn_misrouted",
        "of the router's choices are others on the very same input",
        "where the layer is not unexplained otherwise, the engine's router is not the one "
        "published: restart it",
    ),
    "logprob": (
        "warn_logprob",
        "nats between log-probs, in the mean over tokens",
        "see which layers differ most (`fp8rl report RUN_DIR`), and correct the loss for it "
        "(correction.stages)",
    ),
}


class DriftWatch:
    """The watch of one run, on one trainer rank; see ``Probe`` for the arguments."""

    def __init__(
        self,
        config: RunConfig,
        trainer: MegatronTrainer,
        engine: RolloutEngine | None,
        plan: QuantPlan,
    ) -> None:
        self._config = config.drift
        self._probe = Probe(config, trainer, engine, plan)
        self._warned: set[str] = set()  # metrics beyond their thresholds at the last probe

    def due(self, version: int) -> bool:
        """Whether this step has a probe; the first has."""
        return self._config.every is not None and version % self._config.every == 0

    def probe(self, batch: TokenBatch, version: int, scales: KVScales | None) -> Metrics:
        """Compare engine and trainer; with ``drift/warnings``, the thresholds that are passed.

        Args, Raises: see ``Probe.measure``.
        """
        found = self._probe.measure(batch, version, scales)
        return found | {"drift/warnings": len(self.beyond(found))}

    def beyond(self, metrics: Metrics) -> dict[str, float]:
        """The metrics of a probe that pass their threshold; NaN does."""
        return {
            key: float(value)
            for key, value in metrics.items()
            if (limit := self._limit(key)) is not None and not float(value) <= limit
        }

    def warnings(self, metrics: Metrics) -> list[str]:
        """One line for each kind of threshold that metrics of this probe are the first to pass."""
        beyond = self.beyond(metrics)
        new = [key for key in beyond if key not in self._warned]
        self._warned = set(beyond)
        kinds = dict.fromkeys(_kind(key) for key in new)
        return [
            self._line(kind, {key: beyond[key] for key in new if _kind(key) == kind})
            for kind in kinds
        ]

    @property
    def recalibrates(self) -> bool:
        """Whether to measure KV scales anew, for the last probe found the cache at fault."""
        at_fault = any(_kind(key) == "cache" for key in self._warned)
        return self._config.answer == "recalibrate" and at_fault

    @property
    def tightens(self) -> bool:
        """Whether to tighten the correction, for the last probe passed a threshold."""
        return self._config.answer == "tighten" and bool(self._warned)

    def state(self) -> dict[str, Tensor]:
        """What the next probe needs, for a checkpoint."""
        text = json.dumps(sorted(self._warned)).encode()
        return {"drift/warned": torch.tensor(list(text), dtype=torch.uint8)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        self._warned = set(json.loads(bytes(state["drift/warned"].tolist())))

    def _limit(self, key: str) -> float | None:
        name, _, _ = LIMITS.get(_kind(key), ("", "", ""))
        return float(getattr(self._config, name)) if name else None

    def _line(self, kind: str, found: Mapping[str, float]) -> str:
        name, what, remedy = LIMITS[kind]
        worst = max(found, key=lambda key: found[key])
        limit = getattr(self._config, name)
        return (
            f"warning: drift{_where(worst)}: {found[worst]:.3g} {what}{_others(worst, found)}; "
            f"drift.{name} is {limit:g}: {remedy}"
        )


def _kind(key: str) -> str:
    """``unexplained`` of ``drift/3/unexplained``, ``logprob`` of ``drift/logprob``."""
    return key.rpartition("/")[2]


def _where(key: str) -> str:
    parts = key.split("/")
    return f" in layer {parts[1]}" if len(parts) == 3 else ""


def _others(worst: str, found: Mapping[str, float]) -> str:
    layers: Sequence[str] = [key.split("/")[1] for key in found if key != worst]
    return f" (also in layers {', '.join(layers)})" if layers else ""
