"""Run in a process of its own: a trainer that publishes many versions to one engine.

Usage: python -m tests.sync.many_updates_worker FOLDER UPDATES. Prints one JSON object: for each
version what was sent and what the engine says it holds, and the memory of both sides.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from fp8rl.engine.rollout import RolloutEngine
from fp8rl.quant import QuantPlan
from fp8rl.sync import IterableSource, Publisher
from tests import helpers

FULL_EVERY = 5
MEASURED_FROM = 100  # updates, after which every pool and cache has its size


def main(folder: Path, updates: int) -> None:
    settings = helpers.settings()
    plan: QuantPlan = settings.plan()
    weights = helpers.weights(0)
    generator = torch.Generator().manual_seed(2)
    found: list[dict[str, Any]] = []
    with (
        RolloutEngine(settings, folder) as engine,
        Publisher(
            plan, engine, kv_layers=helpers.LAYERS, deltas=True, full_every=FULL_EVERY
        ) as publisher,
    ):
        ours, theirs = psutil.Process(), psutil.Process(engine.pid)
        for version in range(updates):
            for tensor in weights.values():
                moved = torch.rand(tensor.shape, generator=generator) < 0.01
                tensor[moved] *= 1.0625 if version % 2 else 0.9375
            report = publisher.publish(
                IterableSource(weights), version=version, kv_scales=helpers.scales(version)
            )
            assert report is not None
            (worker,) = engine.worker_report()
            gc.collect()
            found.append(
                {
                    "version": version,
                    "kind": report.kind,
                    "held": worker["version"],
                    "failure": worker["failure"],
                    "proven": worker["tensors_proven"],
                    "trainer": ours.memory_info().rss,
                    "engine": theirs.memory_info().rss,
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
