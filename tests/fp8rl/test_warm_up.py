"""A start that several runs share: what it holds, and whom it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.errors import CheckpointError, ConfigError
from fp8rl.quant import QuantPlan
from fp8rl.task import DigitTask
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from fp8rl.warm_up import demonstrations, load_start, make_start
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


def test_planted_outliers_change_k_biases_alone_and_hardly_the_policy(tmp_path: Path) -> None:
    def state_and_logprobs(outliers: float | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        run, folder = config(None, model=SHAPE | {"family": "qwen2"}), tmp_path / f"{outliers}"
        warmup = run.warmup.model_copy(update={"key_outliers": outliers})
        run = run.model_copy(update={"warmup": warmup})
        make_start(run, folder)
        task = DigitTask(run.task, run.seed)
        with init_distributed(run):
            trainer = MegatronTrainer(run, task.vocab_size)
            load_start(folder, run, trainer)
            return trainer.state(), trainer.log_probs(demonstrations(run, task, 0))

    (plain, expected), (planted, found) = state_and_logprobs(None), state_and_logprobs(100.0)
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    changed = {n for n in plain if not torch.equal(plain[n], planted[n])}
    assert changed == {f"master/{name}", f"model/{name}"}
    moved = (planted[f"master/{name}"] - plain[f"master/{name}"]).view(2, 3, 64)
    assert not moved[:, [0, 2]].any(), "q and v of each head stay"
    slow = moved[:, 1].nonzero()[:, 1].unique()
    assert slow.tolist() == [*range(24, 32), *range(56, 64)], "the slowest quarter of RoPE's pairs"
    assert moved[:, 1, slow].abs().min() >= 50 and moved.abs().max() <= 100
    assert (found - expected).abs().mean() < 0.05, "BF16 has 0.5 between numbers there"


def test_outliers_need_biases(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key_outliers is 50, which needs the K biases of model"):
        config(None, warmup={"key_outliers": 50.0})


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
