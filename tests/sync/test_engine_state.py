"""What an engine takes and holds: named, loaded in whole or in part, and proven by tensor.

Real vLLM models are updated, damaged in one place at a time, and have loads break in them; the
read-back must name the damaged tensor and no other, and the next good load must make the model
what a fresh one is, bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8rl.quant.shard_layout import Box, ShardLayout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASES = ("dense fp8", "tied bf16", "moe fp8", "moe bf16")
ATTENTION = "model.layers.1.self_attn"
ALWAYS = {
    "first bias of a fused linear": f"{ATTENTION}.q_proj.bias",
    "last bias of a fused linear": f"{ATTENTION}.v_proj.bias",
    "norm": "model.layers.0.input_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "head's copy in the kernel": "lm_head.weight",
}
BF16 = ALWAYS | {"linear's copy in the kernel": f"{ATTENTION}.q_proj.weight"}
NAMED = ALWAYS | {
    "first part of a fused linear": f"{ATTENTION}.q_proj.weight",
    "last part of a fused linear": f"{ATTENTION}.v_proj.weight",
    "scales of up_proj": "model.layers.1.mlp.up_proj.weight_scale_inv",
    "k scale on the device": f"{ATTENTION}.attn.k_scale",
    "v scale's CPU copy": f"{ATTENTION}.attn.v_scale",
    "q scale's float mirror": f"{ATTENTION}.attn.q_scale",
    "k scale's float mirror": f"{ATTENTION}.attn.k_scale",
}


def run(module: str, *arguments: str, timeout: float = 240) -> Any:
    command = [sys.executable, "-m", f"tests.sync.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def everything() -> Any:
    return run("engine_parts_worker", *CASES, "refusals", "ranks")


@pytest.fixture(params=CASES)
def seen(request: pytest.FixtureRequest, everything: Any) -> Any:
    return everything[request.param]


def test_the_engine_takes_what_the_plan_sends_each_weight_in_one_unit(seen: Any) -> None:
    assert seen["unplanned"] == []
    assert seen["in no unit or in two"] == []


def test_a_load_is_proven_and_other_weights_are_not(seen: Any) -> None:
    assert seen["after a load"] == []
    assert seen["old weights named"] == seen["weights"]


def test_a_load_of_some_units_touches_no_other_module(seen: Any, everything: Any) -> None:
    assert seen["after a load of some"] == []
    tied = seen is everything["tied bf16"]
    assert seen["touched besides"] == (["lm_head.product"] if tied else [])


def test_damage_is_named_and_nothing_else(seen: Any) -> None:
    assert seen["damaged"].keys() == seen["to be named"].keys()
    for damage, problems in seen["damaged"].items():
        assert len(problems) == 1, damage
        assert problems[0].startswith(f"{seen['to be named'][damage]}: "), damage
    assert seen["repaired"] == []


def test_after_a_load_that_broke_the_next_makes_it_like_a_fresh_one(seen: Any) -> None:
    for broken in seen["broken"].values():
        assert broken["raised"] in ("ConnectionError", "NotImplementedError")
        assert (broken["meta"], broken["wrapped"]) == (0, 0)
    assert len(seen["broken"]) >= 2
    assert seen["unlike a fresh one"] == []


def test_what_is_not_whole_known_or_fitting_is_refused_before_anything_is_touched(
    everything: Any,
) -> None:
    said = everything["refusals"]
    for what in ("a part", "a part read back"):
        assert "model.layers.0.self_attn.qkv_proj is loaded as one, but " in said[what]
        assert "model.layers.0.self_attn.k_proj.weight" in said[what]
    assert said["unknown"] == "the engine's model has no model.layers.7.mlp.up_proj.weight"
    assert said["shape"].endswith(
        "takes torch.bfloat16 [2100, 256], found torch.bfloat16 [2099, 256]"
    )
    assert said["dtype"].endswith(
        "takes torch.bfloat16 [2100, 256], found torch.float32 [2100, 256]"
    )
    assert said["touched"] == "False"


def test_a_kernel_that_keeps_its_old_weights_is_noticed_by_the_load(everything: Any) -> None:
    assert everything["refusals"]["old kernel"] == (
        "lm_head: new weights were loaded, but the kernel of a ParallelLMHead was not made anew "
        "and multiplies by the old ones"
    )


def test_the_parts_of_two_workers_are_the_whole_tensors_each_with_its_scales(
    everything: Any,
) -> None:
    parts = {
        name: [Box(tuple(offset), tuple(shape)) for offset, shape in boxes]
        for name, (_, boxes) in everything["ranks"].items()
    }
    undivided = set()
    for name, (shape, _) in everything["ranks"].items():
        different = dict.fromkeys(parts[name])  # of replicas one counts
        if len(different) == 1:
            undivided.add(name.removesuffix("_scale_inv").split(".")[-2])
        if len(shape) > 1:
            ShardLayout(tuple(shape), tuple(different))  # raises where they do not tile the whole
        else:
            assert list(different) == [Box((0,), tuple(shape))], name
        if name.endswith("_scale_inv"):
            of = parts[name.removesuffix("_scale_inv")]
            assert parts[name] == [box.blocks((128, 128)) for box in of], name
    norms = {"q_norm", "k_norm", "norm", "input_layernorm", "post_attention_layernorm"}
    assert undivided == norms | {"gate", "k_proj", "v_proj"}


@pytest.mark.parametrize("precision", ["fp8-kv", pytest.param("bf16", marks=pytest.mark.long)])
def test_in_an_engine_damage_to_weights_or_kv_scales_is_named(
    precision: str, tmp_path: Path
) -> None:
    found = run("engine_state_worker", precision, str(tmp_path))
    assert found.pop("untouched") == found.pop("restored") == []
    assert found.pop("healed after a load that broke") == []
    named = NAMED if precision == "fp8-kv" else BF16
    assert found.keys() == named.keys()
    for case, problems in found.items():
        assert len(problems) == 1, case
        assert problems[0].startswith(f"{named[case]}: "), case
