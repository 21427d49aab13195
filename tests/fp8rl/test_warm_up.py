"""A start that several runs share: what it holds, and whom it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.errors import CheckpointError
from fp8rl.quant import QuantPlan
from fp8rl.task import DigitTask
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from fp8rl.warm_up import load_start, make_start
from tests.fp8rl.run_helpers import TINY

SHAPE = {"num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "num_heads": 2}


def config(folder: Path | None, **changes: Any) -> RunConfig:
    warmup = {"steps": 3, "batch_size": 16, "start_from": folder and str(folder)}
    return parse_config(
        {"seed": 5, "model": SHAPE, "task": TINY["task"], "warmup": warmup} | changes
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    make_start(config(None), folder)
    return folder


def begun(run: RunConfig) -> dict[str, torch.Tensor]:
    """The state of a trainer of `run` that begins at its start."""
    task = DigitTask(run.task, run.seed)
    plan = QuantPlan.from_hf_config(hf_config(run.model, task.vocab_size, 16), weights="fp8")
    assert run.warmup.start_from is not None
    with init_distributed(run):
        trainer = MegatronTrainer(run, task.vocab_size, plan)
        before = trainer.state()
        load_start(run.warmup.start_from, run, trainer)
        after = trainer.state()
    assert any(not torch.equal(before[name], after[name]) for name in after)
    return after


def test_arms_of_a_seed_begin_with_the_same_weights_and_no_moments(start: Path) -> None:
    plain, other = begun(config(start)), begun(config(start, trainer={"learning_rate": 1e-2}))
    aligned = begun(config(start, trainer={"precision": "fp8-aligned"}))
    for state in (other, aligned):
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    assert all(not t.any() for name, t in plain.items() if name.startswith("adam/exp_avg"))


def test_a_start_is_that_of_its_warm_up_and_made_once(start: Path, tmp_path: Path) -> None:
    make_start(config(None), tmp_path)
    again, first = begun(config(tmp_path)), begun(config(start))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    [made] = start.glob("*/manifest.json")
    written = made.stat().st_mtime_ns
    make_start(config(None), start)
    assert made.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "seed is 5, the run's 6"),
        ({"model": SHAPE | {"num_layers": 2}}, "model is .*'num_layers': 1.*the run's"),
        ({"task": TINY["task"] | {"max_digits": 3}}, "task is"),
    ],
)
def test_a_start_of_another_run_is_refused(start: Path, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"is the start of another run: {message}"):
        begun(config(start, **changes))


def test_a_folder_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no start"):
        begun(config(tmp_path))
