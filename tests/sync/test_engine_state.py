"""The read-back sees any difference between what the engine holds and what was sent.

A real vLLM model is damaged in one place at a time; the read-back must name that tensor and no
other. Also: after a load that broke halfway the next good update proves itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ATTENTION = "model.layers.1.self_attn"
ALWAYS = {
    "first bias of a fused linear": f"{ATTENTION}.q_proj.bias",
    "last bias of a fused linear": f"{ATTENTION}.v_proj.bias",
    "norm": "model.layers.0.input_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "head's copy in the kernel": "lm_head.weight",
}
FP8 = {
    "first part of a fused linear": f"{ATTENTION}.q_proj.weight",
    "last part of a fused linear": f"{ATTENTION}.v_proj.weight",
    "scales of up_proj": "model.layers.1.mlp.up_proj.weight_scale_inv",
}
FP8_KV = {
    "k scale on the device": f"{ATTENTION}.attn.k_scale",
    "v scale's CPU copy": f"{ATTENTION}.attn.v_scale",
    "q scale's float mirror": f"{ATTENTION}.attn.q_scale",
    "k scale's float mirror": f"{ATTENTION}.attn.k_scale",
}
NAMED = {
    "bf16": ALWAYS | {"linear's copy in the kernel": f"{ATTENTION}.q_proj.weight"},
    "fp8-kv": ALWAYS | FP8 | FP8_KV,
}


@pytest.mark.parametrize("precision", NAMED)
def test_damage_anywhere_is_named(precision: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.sync.engine_state_worker", precision, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("untouched") == found.pop("restored") == []
    assert found.pop("healed after a load that broke") == []
    assert found.keys() == NAMED[precision].keys()
    for case, problems in found.items():
        assert len(problems) == 1, case
        assert problems[0].startswith(f"{NAMED[precision][case]}: "), case
