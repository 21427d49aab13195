"""An engine is audited against the plan when it comes up, before anything is sent to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8rl.engine.rollout import RolloutEngine
from fp8rl.errors import EngineError
from tests import helpers

pytestmark = pytest.mark.slow


def test_an_engine_that_is_not_as_planned_is_refused_by_tensor(tmp_path: Path) -> None:
    with RolloutEngine(helpers.settings("fp8"), tmp_path) as engine:
        engine.settings = helpers.settings("bf16")  # what the trainer believes
        for _ in range(2):  # not only at first
            with pytest.raises(EngineError) as refused:
                engine.wait_ready()
    linears = helpers.LAYERS * 7
    assert f"differs from the quantization plan in {linears} tensor(s)" in str(refused.value)
    assert (
        "model.layers.0.self_attn.q_proj.weight: torch.float8_e4m3fn in the engine, planned "
        "torch.bfloat16"
    ) in str(refused.value)
