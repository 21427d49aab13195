"""Where engine and trainer are farthest apart, and most of it why: a layer of a probe, in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fp8rl.report.words import percent
from fp8rl.run_dir import Metrics

OWN = re.compile(r"drift/(\d+)/own")
PARTS = ("weights", "activations", "cache", "router", "unexplained")


@dataclass(frozen=True)
class WorstLayer:
    """own: rms difference / rms of what the layer adds. cause: the largest part of it.

    NaN is larger than any number: a layer or a part that is none is the worst.
    """

    layer: int
    step: int
    own: float
    cause: str

    @property
    def words(self) -> str:
        """``layer 2, step 20: 42 % of what it adds, by unexplained``."""
        share = "NaN" if math.isnan(self.own) else f"{percent(self.own)} of what it adds"
        return f"layer {self.layer}, step {self.step}: {share}, by {self.cause}"


def worst_layer(metrics: Iterable[Metrics]) -> WorstLayer | None:
    """The worst layer of all probes among these steps; None where there was no probe.

    Of several the first: the earliest step, the lowest layer.
    """
    found = [
        (float(value), int(line["step"]), int(match[1]), line)
        for line in metrics
        for key, value in line.items()
        if (match := OWN.fullmatch(key))
    ]
    if not found:
        return None
    value, step, layer, line = max(found, key=lambda x: (*_size(x[0]), -x[1], -x[2]))
    parts = {name: float(line.get(f"drift/{layer}/{name}", 0.0)) for name in PARTS}
    return WorstLayer(layer, step, value, max(parts, key=lambda name: _size(parts[name])))


def _size(value: float) -> tuple[bool, float]:
    """By what values are ordered; NaN itself cannot be."""
    return (True, 0.0) if math.isnan(value) else (False, value)
