"""Updates that land in the middle of requests, and scales that somebody else changes.

One live engine, driven step by step in a process of its own; what it saw is looked at here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.fp8rl.engine_server_worker import BEFORE, PROMPTS, TOKENS

pytestmark = pytest.mark.slow  # a real engine

KL_BOUND = 1e-3


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> what the worker saw."""
    folder = tmp_path_factory.mktemp("engine")
    command = [sys.executable, "-m", "tests.fp8rl.engine_server_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_token_carries_the_version_that_sampled_it(seen: dict[str, Any]) -> None:
    case = seen["in flight"]
    expected = [case["old"]] * BEFORE + [case["new"]] * (TOKENS - BEFORE)
    assert case["versions"] == [expected] * len(PROMPTS)


def test_a_request_in_flight_goes_on_as_from_scratch_under_new_weights_and_scales(
    seen: dict[str, Any],
) -> None:
    case = seen["in flight"]
    assert case["new tokens under the new weights"] <= KL_BOUND
    assert case["old tokens under the old weights"] <= KL_BOUND
    assert case["old tokens under the new weights"] > 100 * KL_BOUND, "the weights do differ"


def test_a_segment_after_an_update_reads_its_prefix_anew_under_the_new_weights(
    seen: dict[str, Any],
) -> None:
    case = seen["segments"]
    assert case["lengths"] == case["bounds"]
    assert min(case["cached under the same weights"]) > 0, "else there is nothing to be stale"
    assert max(case["cached under new weights"]) == 0
    assert case["versions"] == [[case["new"]] * TOKENS] * len(PROMPTS)
    assert case["new tokens under the new weights"] <= KL_BOUND
    assert case["new tokens under other weights"] > 100 * KL_BOUND, "the weights do differ"


def test_scales_that_somebody_changed_are_refused_by_layer_until_a_publish(
    seen: dict[str, Any],
) -> None:
    case = seen["overwritten"]
    assert "StaleWeightsError: 1 KV scale(s) are not those that were published" in case["submit"]
    assert "model.layers.1.self_attn.attn.k_scale" in case["submit"]
    assert "publish again" in case["submit"]
    assert case["published again"] == len(PROMPTS)


def test_an_engine_that_sleeps_or_is_half_awake_serves_nothing(seen: dict[str, Any]) -> None:
    case = seen["asleep"]
    assert "StaleWeightsError: the engine sleeps (['kv_cache', 'weights'])" in case["submit"]
    assert "StaleWeightsError: the engine sleeps (['kv_cache'])" in case["submit half awake"]


def test_scales_lost_in_the_sleep_are_there_again_after_it(seen: dict[str, Any]) -> None:
    case = seen["asleep"]
    assert case["lost"]
    assert case["restored"]
    assert case["same answers"]
