"""The engine half of veRL's weight sync, on the real vLLM: what came is proven, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import helpers

pytest.importorskip("vllm", reason="the engine half needs vLLM: run in the main environment")

pytestmark = pytest.mark.slow


def ran(*arguments: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integrations.engine_worker", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ran(str(tmp_path_factory.mktemp("engine")))


def test_an_engine_as_veRL_starts_it_takes_a_version_and_proves_it(seen: dict[str, Any]) -> None:
    first = seen["first"]
    assert first["version"] == 7 and first["failure"] is None
    assert first["kv_scales_proven"] == 3 * helpers.LAYERS
    plan = helpers.settings().plan()
    assert first["tensors_proven"] == len(plan.engine_tensors()) + 3 * helpers.LAYERS


def test_experts_are_fp8_and_their_router_is_not(tmp_path: Path) -> None:
    report = ran(str(tmp_path), "moe")
    assert report["version"] == 1 and report["failure"] is None
    # two layers of: 4 attention linears and 4 experts of 3, each with scales; router, 4 norms
    assert report["tensors_proven"] == 2 * (2 * (4 + 4 * 3) + 1 + 4) + 3


def test_through_the_checkpoint_engine_it_is_the_same(seen: dict[str, Any]) -> None:
    assert seen["second"]["version"] == 9 and seen["second"]["failure"] is None
    assert seen["answers"] == [True, True]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("damaged", "CorruptTensorError: "),
        ("gap", "ManifestError: "),
        ("plain", "ManifestError: model.norm.weight: came in an update"),
    ],
)
def test_what_does_not_fit_is_refused(seen: dict[str, Any], what: str, told: str) -> None:
    assert seen[what].startswith(told)
    assert seen["held"] == 7
