"""The drift watch of a run: every so many steps a probe, and a warning where a layer drifts off.

A probe (``probe.py``) says for each layer how far engine and trainer are apart, and why
(``parts.py``). What the engine's roundings explain is the price of FP8, and known; what they
do not is small, or something is wrong in the engine: a kernel, a buffer, weights that changed after
they were proven. A threshold that is passed is told once, with the layers and what to do, and again
only after a probe that found it kept. What the run itself does about it is in ``answer.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.rollout import RolloutConfig
from fp8rl.config.run import RunConfig
from fp8rl.drift.answer import Part, blamed, fallen_back
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
FALLEN_BACK = "drift/fallen_back"  # in the state


@dataclass(frozen=True)
class FallBack:
    """What a probe's rollout goes on as, and why; ``after`` is ``before`` where nothing is left."""

    before: RolloutConfig
    after: RolloutConfig
    why: str

    @property
    def line(self) -> str:
        """What the console is told."""
        old, new = self.before.precision, self.after.precision
        if self.after == self.before:
            return (
                "drift: nothing is left to fall back to, for nothing in the engine is FP8; the run "
                f"goes on as it is, with {self.why}"
            )
        named = f"{new} with BF16 routers" if new == old else new
        return (
            f"drift: from the next step on a new engine runs in {named} in place of {old}, for "
            f"good: {self.why}"
        )

    @property
    def metrics(self) -> Metrics:
        """What the step's metrics are told; nothing where nothing changes."""
        return {} if self.after == self.before else {"drift/fall_back": self.why}


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
        self._rollout = config.rollout
        self._probe = Probe(config, trainer, engine, plan)
        self._warned: set[str] = set()  # metrics beyond their thresholds at the last probe
        self._fallen_back: frozenset[Part] = frozenset()
        self._told_the_end = False  # that nothing is left to fall back to

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
        new = {key: value for key, value in beyond.items() if key not in self._warned}
        self._warned = set(beyond)
        return [self._line(kind, found) for kind, found in _by_kind(new).items()]

    @property
    def recalibrates(self) -> bool:
        """Whether to measure KV scales anew, for the last probe found the cache at fault."""
        at_fault = any(_kind(key) == "cache" for key in self._warned)
        return self._config.answer == "recalibrate" and at_fault

    @property
    def tightens(self) -> bool:
        """Whether to tighten the correction, for the last probe passed a threshold."""
        return self._config.answer == "tighten" and bool(self._warned)

    def fall_back(self, metrics: Metrics) -> FallBack | None:
        """What to do about a probe where drift is answered by falling back; None is nothing.

        That nothing is left is said once.
        """
        found = _by_kind(self.beyond(metrics))
        if self._config.answer != "fall-back" or not found:
            return None
        self._fallen_back |= blamed(self._rollout, found)
        after = self.rollout
        if after == self._rollout and self._told_the_end:
            return None
        self._told_the_end |= after == self._rollout
        return FallBack(self._rollout, after, "; ".join(map(_worst, found.values())))

    @property
    def rollout(self) -> RolloutConfig:
        """The rollout of the next step: as it was, but for what has fallen back."""
        return fallen_back(self._rollout, self._fallen_back)

    def state(self) -> dict[str, Tensor]:
        """What the next probe needs, for a checkpoint."""
        fallen = {"parts": sorted(self._fallen_back), "told_the_end": self._told_the_end}
        return {"drift/warned": _packed(sorted(self._warned)), FALLEN_BACK: _packed(fallen)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        self._warned = set(_unpacked(state["drift/warned"]))
        fallen = _unpacked(state[FALLEN_BACK])
        self._fallen_back = frozenset(fallen["parts"])
        self._told_the_end = fallen["told_the_end"]

    def _limit(self, key: str) -> float | None:
        name, _, _ = LIMITS.get(_kind(key), ("", "", ""))
        return float(getattr(self._config, name)) if name else None

    def _line(self, kind: str, found: Mapping[str, float]) -> str:
        name, what, remedy = LIMITS[kind]
        worst = _worst_key(found)
        limit = getattr(self._config, name)
        return (
            f"warning: drift{_where(worst)}: {found[worst]:.3g} {what}{_others(worst, found)}; "
            f"drift.{name} is {limit:g}: {remedy}"
        )


def _worst_key(found: Mapping[str, float]) -> str:
    """The largest; NaN is larger than any number."""
    return max(found, key=lambda key: (math.isnan(found[key]), found[key]))


def _worst(found: Mapping[str, float]) -> str:
    """The worst of the metrics of one kind, in words."""
    key = _worst_key(found)
    _, what, _ = LIMITS[_kind(key)]
    return f"{found[key]:.3g} {what}{_where(key)}"


def _by_kind(found: Mapping[str, float]) -> dict[str, dict[str, float]]:
    kinds = dict.fromkeys(map(_kind, found))
    return {kind: {k: v for k, v in found.items() if _kind(k) == kind} for kind in kinds}


def _packed(value: object) -> Tensor:
    """JSON as the bytes of a tensor."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def _kind(key: str) -> str:
    """``unexplained`` of ``drift/3/unexplained``, ``logprob`` of ``drift/logprob``."""
    return key.rpartition("/")[2]


def _where(key: str) -> str:
    parts = key.split("/")
    return f" in layer {parts[1]}" if len(parts) == 3 else ""


def _others(worst: str, found: Mapping[str, float]) -> str:
    layers: Sequence[str] = [key.split("/")[1] for key in found if key != worst]
    return f" (also in layers {', '.join(layers)})" if layers else ""


def fallen_back_in(state: Mapping[str, Tensor]) -> frozenset[Part]:
    """The parts that have fallen back, of a ``DriftWatch.state``."""
    return frozenset(_unpacked(state[FALLEN_BACK])["parts"])
