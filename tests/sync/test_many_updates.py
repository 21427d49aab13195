"""Hundreds of updates in a row: every version proven, and the memory of both sides flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import helpers
from tests.sync.many_updates_worker import FULL_EVERY, MEASURED_FROM

pytestmark = pytest.mark.long

UPDATES = 500


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("many")
    command = [sys.executable, "-m", "tests.sync.many_updates_worker", str(folder), str(UPDATES)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_every_version_is_proven_and_held(found: list[dict[str, Any]]) -> None:
    tensors = len(helpers.settings().plan().engine_tensors()) + 3 * helpers.LAYERS
    assert [one["held"] for one in found] == list(range(UPDATES))
    assert {one["failure"] for one in found} == {None}
    assert {one["proven"] for one in found} == {tensors}


def test_whole_versions_and_differences_take_turns(found: list[dict[str, Any]]) -> None:
    kinds = ["full" if i % FULL_EVERY == 0 else "delta" for i in range(UPDATES)]
    assert [one["kind"] for one in found] == kinds


@pytest.mark.parametrize("side", ["trainer", "engine"])
def test_memory_stays_flat(side: str, found: list[dict[str, Any]]) -> None:
    memory = [one[side] for one in found]
    first, last = memory[MEASURED_FROM], memory[-1]
    assert abs(last - first) <= 0.02 * first, f"{first} -> {last} bytes"
