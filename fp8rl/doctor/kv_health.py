"""How a run's KV-cache scales did in its last step, for ``fp8rl doctor RUN_DIR``.

    saturation   share of the elements of q, k or v beyond 448 times the scale: they were clipped
    underflow    share of the elements not 0 that the scale rounds to 0

Both were counted on the step's own rollout tokens. Beside them, where the run has a drift watch,
what its last probe found. Everything comes from the run folder's
config.yaml and metrics.jsonl: no engine is started, and torch is not imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp8rl.errors import RunDirError
from fp8rl.report.drift import WorstLayer, worst_layer
from fp8rl.report.words import ARMS, percent, warn_saturation
from fp8rl.run_dir import Metrics, RunDir

SCALE = re.compile(r"kv_scale/(\d+)/[qkv]")
REMEDY = (
    "raise kv_scales.margin, calibrate on more tokens (kv_scales.calibration_tokens) or on the "
    "batch just trained (kv_scales.calibrate_on=trained), or take amax instead of a percentile "
    "(kv_scales.observer)"
)


@dataclass(frozen=True)
class TensorHealth:
    """The scale of q, k or v in one layer, and what it did to the step's tokens.

    saturation, underflow: shares in [0, 1]; None where the step sampled nothing to count.
    """

    layer: int
    tensor: str
    scale: float
    saturation: float | None
    underflow: float | None


@dataclass(frozen=True)
class DriftHealth:
    """The last probe of engine against trainer: thresholds that it passed, and the worst layer."""

    warnings: int
    worst: WorstLayer

    @property
    def line(self) -> str:
        """What the doctor says of it."""
        passed = f"{self.warnings} warnings of the last probe"
        return f"Drift of engine and trainer: {passed}; most in {self.worst.words}."


@dataclass(frozen=True)
class KVHealth:
    """The KV scales of one step of a run.

    precision: the run's rollout.precision. step, version: None where no step of the run has KV
    scales, and ``tensors`` is then empty. tokens: on how many the scales were measured. changed:
    how many scales differ from the step's before. worst_saturation: the highest of any tensor in
    any step. drift: None where the run had no probe.
    """

    precision: str
    warn_saturation: float | None
    steps: int
    step: int | None
    version: int | None
    tokens: int | None
    changed: int | None
    worst_saturation: float | None
    tensors: tuple[TensorHealth, ...]
    drift: DriftHealth | None

    @property
    def saturated(self) -> list[TensorHealth]:
        """The tensors whose saturation passes the run's threshold (NaN passes it too)."""
        limit = self.warn_saturation
        return [
            tensor
            for tensor in self.tensors
            if tensor.saturation is not None
            and limit is not None
            and not tensor.saturation <= limit
        ]

    @property
    def warning(self) -> str | None:
        """What is wrong and what to do about it; None where all is well."""
        if not self.saturated:
            return None
        named = ", ".join(f"{t.tensor} of layer {t.layer}" for t in self.saturated)
        return (
            f"in step {self.step} the scales clip more than {percent(self.warn_saturation)} "
            f"(kv_scales.warn_saturation) of {named}: {REMEDY}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; ``ok`` is False where there is a warning."""
        return {"ok": self.warning is None, **asdict(self), "warning": self.warning}


def kv_health(path: Path) -> KVHealth:
    """Look at the run in the folder ``path``: its last step that counted saturation.

    Where no step did, it is the last one that has scales.

    Raises:
        RunDirError: no run is there, or its config or metrics are broken.
    """
    run = RunDir.open(path)
    precision, limit = _settings(run)
    metrics = run.metrics()
    scaled = [line for line in metrics if any(SCALE.fullmatch(key) for key in line)]
    counted = [line for line in scaled if any(key.startswith("kv_saturation/") for key in line)]
    line = (counted or scaled or [{}])[-1]
    if counted and limit is None:
        raise RunDirError(
            f"{run.config}: has no kv_scales.warn_saturation to judge by; add one (0.001)"
        )
    return KVHealth(
        precision=precision,
        warn_saturation=limit,
        steps=len(metrics),
        step=_integer(line, "step"),
        version=_integer(line, "version"),
        tokens=_integer(line, "kv/tokens"),
        changed=_integer(line, "kv/changed"),
        worst_saturation=max(
            (_number(m, "kv/saturation_max") or 0.0 for m in counted), default=None
        ),
        tensors=tuple(_tensors(line)),
        drift=_drift(metrics),
    )


def health_table(health: KVHealth) -> RenderableType:
    """What the doctor shows of it on a terminal."""
    drift = [Text(health.drift.line)] if health.drift else []
    if health.step is None:
        return Group(Text(_nothing_to_see(health)), *drift)
    table = Table(box=SIMPLE)
    for heading in ("layer", "tensor"):
        table.add_column(heading)
    for heading in ("scale", "saturated", "underflowed"):
        table.add_column(heading, justify="right")
    bad = set(health.saturated)
    for tensor in health.tensors:
        table.add_row(
            str(tensor.layer) if tensor.tensor == "q" else "",
            tensor.tensor,
            _scale(tensor.scale),
            percent(tensor.saturation),
            percent(tensor.underflow),
            style="bold red" if tensor in bad else None,
        )
    return Group(Text(_title(health), style="bold"), table, *_remarks(health), *drift)


def _settings(run: RunDir) -> tuple[str, float | None]:
    """The run's rollout.precision, and its threshold (absent in older runs)."""
    config = run.read_config()
    rollout = config.get("rollout")
    precision = rollout.get("precision") if isinstance(rollout, dict) else None
    if precision not in ARMS:
        raise RunDirError(
            f"{run.config}: rollout.precision is {precision!r}, expected one of {list(ARMS)}"
        )
    return precision, warn_saturation(config)


def _tensors(line: Metrics) -> list[TensorHealth]:
    """In the order of the layers' numbers, and q, k, v."""
    layers = {int(match[1]) for key in line if (match := SCALE.fullmatch(key))}
    return [
        TensorHealth(
            layer,
            x,
            float(line[f"kv_scale/{layer}/{x}"]),
            _number(line, f"kv_saturation/{layer}/{x}"),
            _number(line, f"kv_underflow/{layer}/{x}"),
        )
        for layer in sorted(layers)
        for x in "qkv"
    ]


def _drift(metrics: Sequence[Metrics]) -> DriftHealth | None:
    probes = [line for line in metrics if "drift/warnings" in line]
    worst = worst_layer(probes[-1:])
    return DriftHealth(int(probes[-1]["drift/warnings"]), worst) if worst else None


def _nothing_to_see(health: KVHealth) -> str:
    if not health.steps:
        return "No step of this run has ended yet: there are no KV scales to look at."
    return f"This run has no FP8 KV cache ({ARMS[health.precision]}): there are no KV scales."


def _title(health: KVHealth) -> str:
    measured = "" if health.tokens is None else f", measured on {health.tokens} tokens"
    changed = ""
    if health.changed is not None:
        changed = f"; {health.changed} of {len(health.tensors)} differ from the step before"
    return f"KV scales of step {health.step}, version {health.version}{measured}{changed}"


def _remarks(health: KVHealth) -> list[Text]:
    if all(tensor.saturation is None for tensor in health.tensors):
        return [Text("Saturation was not counted in this run, or in no step of it yet.")]
    worst, limit = percent(health.worst_saturation), percent(health.warn_saturation)
    remarks = [Text(f"Highest saturation of all steps {worst}; the run warns above {limit}.")]
    if health.warning is None:
        return [*remarks, Text("All is well in this step.", style="green")]
    return [*remarks, Text(f"Warning: {health.warning}", style="bold red")]


def _scale(value: float) -> str:
    """As 2^n where it is a power of two."""
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{value:.4g}"


def _number(line: Metrics, key: str) -> float | None:
    return float(line[key]) if key in line else None


def _integer(line: Metrics, key: str) -> int | None:
    return int(line[key]) if key in line else None
