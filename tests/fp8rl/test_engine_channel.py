"""The trainer's end of an engine process that does not answer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil

from fp8rl.engine.channel import EngineChannel
from fp8rl.errors import EngineDiedError


def test_closing_a_frozen_engine_ends_the_call_that_another_thread_waits_in(tmp_path: Path) -> None:
    channel = EngineChannel({"tensor_parallel_size": 1}, tmp_path / "engine.log")
    process = psutil.Process(channel.pid)
    process.suspend()
    met: list[BaseException] = []

    def wait() -> None:
        try:
            channel.receive()
        except EngineDiedError as error:
            met.append(error)

    waiting = threading.Thread(target=wait, daemon=True)  # a broken close must not hang the tests
    closing = threading.Thread(target=channel.close, daemon=True)
    try:
        waiting.start()
        time.sleep(0.2)
        closing.start()
        closing.join(10.0)
        waiting.join(10.0)
        assert not closing.is_alive()
        assert not waiting.is_alive()
        assert [type(error) for error in met] == [EngineDiedError]
        assert not process.is_running()
    finally:
        if process.is_running():
            process.kill()
