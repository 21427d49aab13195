"""A trainer that is killed while it publishes.

Usage: python -m tests.sync.dying_trainer URL VERSION PHASE SEED. The phase is where SIGKILL comes:
``introduced``, ``start``, ``stage N``, ``manifest`` (before it is sent), ``applying`` (while the
engine works on it), ``applied``, ``finish``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from fp8rl.sync import HTTPEngine, Publisher, slot_outbox
from tests import helpers
from tests.sync.vllm_server import TOKEN

STAGE_BYTES = 100_000  # some thirteen stages


class Dying:
    """An engine's client that kills its own process."""

    def __init__(self, engine: HTTPEngine, phase: str) -> None:
        self.engine, self.phase, self.stages = engine, phase, 0

    def reached(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(os.getpid(), signal.SIGKILL)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.init_weight_transfer_engine(init_info)
        self.reached("introduced")

    def start_weight_update(self) -> None:
        self.engine.start_weight_update()
        self.reached("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "manifest" in update_info:
            self.reached("manifest")
            if self.phase == "applying":
                threading.Thread(target=self.die_soon).start()
        self.engine.update_weights(update_info)
        if "stage" in update_info:
            self.stages += 1
            self.reached(f"stage {self.stages}")
        elif "manifest" in update_info:
            self.reached("applied")

    def die_soon(self) -> None:
        time.sleep(0.03)
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.engine.finish_weight_update(weight_version)
        self.reached("finish")


def main(url: str, version: int, phase: str, seed: int) -> None:
    slot_outbox.STAGE_BYTES = STAGE_BYTES
    plan = helpers.settings().plan()
    with (
        HTTPEngine(url, token=TOKEN) as engine,
        Publisher(plan, Dying(engine, phase), kv_layers=helpers.LAYERS) as publisher,
    ):
        scales = helpers.scales(version)
        publisher.publish(helpers.source(seed), version=version, kv_scales=scales)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
