"""KV scales reach an engine with BF16 weights and an FP8 cache, stay there, or nothing is served.

vLLM ignores scale names for such an engine and sets its scales to 1.0 with every reload, so this is
where scales get lost. One live engine goes through it all (kv_application_worker.py).
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8rl.quant import QKV, kv_scale_name
from tests import helpers

pytestmark = pytest.mark.slow

NAMES = [kv_scale_name(i, x) for i in range(helpers.LAYERS) for x in QKV]
LAYERS = sorted({name.rpartition(".")[0] for name in NAMES})


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kv")
    command = [sys.executable, "-m", "tests.sync.kv_application_worker", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def source_of(backend: str) -> str:
    """The source of an attention backend of the installed vLLM."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.submodule_search_locations is not None
    folder = Path(vllm.submodule_search_locations[0]) / "v1/attention/backends"
    return (folder / f"{backend}.py").read_text()


def every_copy(scales: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    """What the engine must hold: device scale and float mirror; for k and v a CPU copy too."""
    copies = {"q": 2, "k": 3, "v": 3}
    return {layer: {x: [scales[f"{layer}.{x}_scale"]] * copies[x] for x in QKV} for layer in LAYERS}


@pytest.mark.parametrize(
    "case",
    [
        "first publish",
        "second publish",
        "a measured 1.0",
        "awake",
        "published after that",
        "scales that follow",
        "healed after a measurement that fails",
        "healed after a measurement of other weights",
    ],
)
def test_every_copy_is_what_was_published_and_is_served(case: str, seen: dict[str, Any]) -> None:
    found = seen[case]
    assert found["held"] == every_copy(found["published"])
    assert found["problems"] == []
    assert found["served"] is None


def test_published_scales_change_from_one_publish_to_the_next(seen: dict[str, Any]) -> None:
    first, second = (seen[case]["published"] for case in ("first publish", "second publish"))
    assert {name: 16 * scale for name, scale in first.items()} == second
    assert set(seen["a measured 1.0"]["published"].values()) == {1.0}


def test_nothing_is_served_under_scales_that_nobody_sent(seen: dict[str, Any]) -> None:
    assert "no weights have been published" in seen["before any publish"]["served"]


def test_scales_that_a_reload_set_to_one_are_named_and_not_served(seen: dict[str, Any]) -> None:
    found = seen["vLLM's own reload"]
    assert found["held"] == every_copy(dict.fromkeys(NAMES, 1.0))  # vLLM did do it
    assert [problem.partition(":")[0] for problem in found["problems"]] == NAMES
    assert all("engine holds device scale 1.0, float mirror 1.0" in p for p in found["problems"])
    assert NAMES[0] in found["served"]


def test_an_engine_that_sleeps_serves_nothing(seen: dict[str, Any]) -> None:
    assert "sleeps (level 1)" in seen["asleep"]["served"]
    assert seen["asleep"]["held"] == every_copy(dict.fromkeys(NAMES, 1.0))
    assert "level 2, which discarded its weights" in seen["awake without weights"]["served"]


def test_values_that_a_backend_derived_from_old_scales_are_dropped(seen: dict[str, Any]) -> None:
    assert seen["awake"]["derived"] == [[None] * 3] * helpers.LAYERS


def test_scales_that_follow_are_measured_on_the_weights_just_applied(seen: dict[str, Any]) -> None:
    midway = seen["midway"]
    assert midway["weights"] == []  # no difference to what was sent
    assert "was applied and not committed" in midway["served"]
    assert midway["tokens"] == 4
    assert midway["held"] == every_copy(midway["published"])  # computing with the last ones


def test_an_update_whose_scales_could_not_be_measured_is_undone(seen: dict[str, Any]) -> None:
    failed, other = seen["a measurement that fails"], seen["a measurement of other weights"]
    assert failed["error"] == "RuntimeError: the calibration batch is empty"
    assert "KVScaleError" in other["error"] and "measured on version 0" in other["error"]
    for found, why in ((failed, "calibration batch is empty"), (other, "measured on version 0")):
        assert "weights of version" in found["served"] and "were asked for" in found["served"]
        assert why in found["served"]
        assert found["held"] == every_copy(found["published"]) and found["problems"] == []
        assert found["served before"] is None


def test_nothing_is_observed_outside_of_an_update(seen: dict[str, Any]) -> None:
    assert "begin an update and send its weights first" in seen["observing outside of an update"]


REFUSED = {
    "latent attention": "LatentAttention keeps an fp8 cache",
    "scales of each token": "kv_cache_dtype 'fp8_per_token_head'",
    "another format": "kv_cache_dtype 'fp8_e5m2'",
    "scales of each head": "_k_scale holds 2 scales",
    "no float mirror": "_v_scale_float is None",
    "another layer's cache": "another layer's FP8 cache",
    "floats in a full graph": "'flashinfer' reads KV scales as Python floats",
    "floats in a piece of a graph": "cudagraph_mode=PIECEWISE bake in",
    "an unknown backend": "'my_backends.sdpa' may keep old KV scales",
}
REMEDY = {
    "floats in a full graph": "compilation_config={'cudagraph_mode': 'PIECEWISE'}",
    "an unknown backend": "Use one of ['b12x', 'cpu_attn', 'flash_attn'",
    "latent attention": "Use kv_cache_dtype='auto'",
}


def test_attention_whose_scales_cannot_be_set_is_refused_by_name(seen: dict[str, Any]) -> None:
    found = seen["refused at start"]
    served = {"as it is", "floats between graphs", "floats without graphs"}
    assert {case for case, error in found.items() if error is None} == {
        *served,
        "tensors in a full graph",
    }
    assert found.keys() - REFUSED.keys() == {*served, "tensors in a full graph"}
    for case, named in REFUSED.items():
        assert found[case].startswith("UnsupportedAttentionError: ")
        assert named in found[case] and REMEDY.get(case, "") in found[case]
        assert all(layer in found[case] for layer in LAYERS), case


def test_backends_read_scales_as_the_table_says(seen: dict[str, Any]) -> None:
    """Held against the installed vLLM's source: a backend that changes must be looked at again."""
    kinds = {"": "device", "_float": "float", "_cpu": "CPU copy"}
    for backend, reads in seen["what backends read"].items():
        source = source_of(backend)
        found = re.findall(r"layer\._[qkv]_scale(_float|_cpu|)\b", source)
        assert sorted({kinds[suffix] for suffix in found}) == reads, backend
        assert not re.findall(r"getattr\(layer, [^)]*scale", source), backend


def test_flashinfer_derives_again_what_is_none() -> None:
    source = source_of("flashinfer")
    for name in ("self.bmm1_scale", "self.bmm2_scale", "layer._o_scale_float"):
        assert source.count(f"if {name} is None:") == 1, name
    constant, derived = {"scale", "sm_scale"}, {"bmm1_scale", "bmm2_scale", "o_sf_scale"}
    assert set(re.findall(r"self\.(\w*scale) \*?= ", source)) == constant | derived
