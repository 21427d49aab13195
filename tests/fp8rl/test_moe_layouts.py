"""Experts over ranks: real torchrun processes on Gloo, compared with one process; a real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fp8rl.quant import dequantize_blockwise, quantize_blockwise
from tests.fp8rl.moe_worker import MODELS
from tests.fp8rl.run_helpers import TINY, Command, metrics

WORKER = Path(__file__).with_name("moe_worker.py")
Seen = dict[str, tuple[dict[str, float], dict[str, Tensor]]]
RanksOf = Callable[[int, int, int], list[Seen]]


def run_layout(out: Path, tp: int, pp: int, ep: int) -> list[Seen]:
    """What every rank of the layout saw of each model, in order of rank."""
    out.mkdir()
    ranks = tp * pp
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(WORKER), str(out), str(tp), str(pp), str(ep)]
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        {
            name: (
                json.loads((out / f"{name}-{rank}.json").read_text()),
                load_file(out / f"{name}-{rank}.safetensors"),
            )
            for name in MODELS
        }
        for rank in range(ranks)
    ]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> RanksOf:
    """Runs each layout once."""

    @cache
    def run(tp: int, pp: int, ep: int) -> list[Seen]:
        return run_layout(tmp_path_factory.mktemp("ranks") / "out", tp, pp, ep)

    return run


@pytest.fixture(scope="module")
def alone(ranks_of: RanksOf) -> Seen:
    [seen] = ranks_of(1, 1, 1)
    return seen


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 1, 1), (2, 2, 2)])
def test_other_layouts_are_the_same_trainer(
    ranks_of: RanksOf, alone: Seen, layout: tuple[int, int, int]
) -> None:
    ranks = ranks_of(*layout)
    for rank, (name, seen) in ((r, item) for r, of in enumerate(ranks) for item in of.items()):
        (expected, tensors), (found, ours) = alone[name], seen
        for each in tensors:
            if each.startswith("start/"):
                assert torch.equal(ours[each], tensors[each]), each
            if each.startswith(("rounded/", "cut/")) and rank == 0:
                assert torch.equal(ours[each], tensors[each]), each
        smooth = name == "all"  # else some tokens go elsewhere, for attention rounds otherwise
        assert found["resumed"] == 1.0
        assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3 if smooth else 0.03)
        norm = pytest.approx(expected["grad_norm"], rel=2e-2 if smooth else 0.1)
        assert found["grad_norm"] == norm
        assert (ours["log_probs"] - tensors["log_probs"]).abs().mean() < (0.02 if smooth else 0.06)
        assert torch.allclose(ours["kv_amax"], tensors["kv_amax"], rtol=0.05)
        same = (ours["routes"] == tensors["routes"]).double().mean()
        assert ours["routes"].shape == tensors["routes"].shape and same > 0.9
        for each in (n for n in ours if smooth and n.startswith("gradient/")):
            gradient = tensors[each]
            if ours[each].shape == gradient.shape:  # else the rank has a part of it
                assert (ours[each] - gradient).norm() < 0.06 * gradient.norm(), each
            assert ours[each].norm() < 1.06 * gradient.norm(), each
        for each in (n for n in tensors if smooth and n.startswith("end/")):
            moved = (tensors[each] - tensors[each.replace("end/", "start/")]).float().norm()
            apart = (ours[each] - tensors[each]).float().norm()
            assert moved > 0 and apart < 0.5 * moved, each


@pytest.mark.slow
@pytest.mark.long
def test_every_expert_and_router_has_the_gradient_of_one_process(
    ranks_of: RanksOf, alone: Seen
) -> None:
    ranks = ranks_of(2, 1, 2)
    _, expected = alone["all"]
    mine = [{n for n in seen["all"][1] if "local_experts" in n} for seen in ranks]
    assert mine[0] | mine[1] == {n for n in expected if "local_experts" in n}
    assert not mine[0] & mine[1]
    for _, ours in (seen["all"] for seen in ranks):
        for name in (n for n in ours if n.startswith("gradient/") and ".mlp." in n):
            assert (ours[name] - expected[name]).norm() < 0.06 * expected[name].norm(), name


@pytest.mark.slow
@pytest.mark.long
def test_a_rounded_router_is_what_fp8_leaves_of_the_one_that_was_trained(alone: Seen) -> None:
    _, tensors = alone["two"]
    rounded = {n.removeprefix("rounded/"): t for n, t in tensors.items() if "rounded/" in n}
    assert len(rounded) == 2
    for name, tensor in rounded.items():
        trained = tensors[f"start/{name}"]
        assert torch.equal(tensor, dequantize_blockwise(quantize_blockwise(trained)))
        assert not torch.equal(tensor, trained)


@pytest.mark.slow
@pytest.mark.long
def test_the_real_loop_runs_over_two_ranks_of_experts(tmp_path: Path) -> None:
    shape = {
        "family": "qwen3_moe", "num_layers": 2, "num_experts": 4, "experts_per_token": 2,
        "moe_ffn_hidden_size": 128, "num_kv_heads": 2,
    }  # fmt: skip
    run: dict[str, Any] = TINY | {"model": shape, "steps": 3}
    run["trainer"] = run["trainer"] | {"tensor_parallel": 2, "expert_parallel": 2}
    run["warmup"] = run["warmup"] | {"steps": 5}
    run["rollout"] = run["rollout"] | {"router": "fp8-rounded"}
    config, folder = tmp_path / "moe.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(run))
    command = Command(folder, config, f"run_dir={folder}")
    end = command.end()
    assert end.code == 0, end.errors[-3000:]
    assert not end.survivors and not end.litter
    seen = metrics(folder)
    assert [line["step"] for line in seen] == [0, 1, 2, 3]
    for line in seen[:3]:
        assert 0.8 < line["router/agreement"] <= 1 and line["router/tokens"] > 100
        assert {"router/agreement/0", "router/agreement/1", "time/routes"} <= line.keys()
        assert line["rollout_corr/k3_kl"] < 0.05
    assert "routers rounded to FP8" in end.output
    assert "Warning" not in end.errors
