"""A converted checkpoint, loaded from disk by vLLM, is the model that the loop publishes live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.quant.convert import convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions
from fp8rl.sync.publisher import Publisher
from tests import helpers
from tests.quant import checkpoint_files

pytestmark = pytest.mark.slow

SEED = 11
SAMPLING = Sampling(max_tokens=12, stop_token=helpers.EOS, samples=2)
# Within one block of the KV cache: beyond it, vLLM's CPU backend now and then gives other log-probs
# in one process than in another, for one and the same checkpoint.
PROMPTS = [[2 + (i * k) % 60 for i in range(60)] for k in (1, 3, 7)] + [[5, 6, 7]]


def served(checkpoint: Path, folder: Path) -> list[tuple[list[int], list[float]]]:
    """What a fresh engine answers that loaded a checkpoint from disk."""
    request = {
        "arguments": helpers.settings("fp8").llm_arguments(folder),
        "prompts": PROMPTS,
        "sampling": SAMPLING.parameters(),
        "seeds": [SEED + index * SAMPLING.samples for index in range(len(PROMPTS))],
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.fp8rl.served_worker", str(checkpoint)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(tokens, logprobs) for tokens, logprobs in json.loads(done.stdout.splitlines()[-1])]


def published(folder: Path, seed: int) -> list[tuple[list[int], list[float]]]:
    """What an engine answers that got the weights from a publisher."""
    with RolloutEngine(helpers.settings("fp8"), folder) as engine:
        with Publisher(engine.settings.plan(), engine) as publisher:
            publisher.publish(helpers.source(seed), version=0, kv_scales=None)
        groups = engine.generate(PROMPTS, version=0, sampling=SAMPLING, seed=SEED)
    return [(list(s.tokens), list(s.logprobs)) for group in groups for s in group]


def test_a_converted_checkpoint_answers_as_published_weights_do_bit_for_bit(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(helpers.hf_config()))
    save_file(helpers.weights(3), source / "model.safetensors")
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    from_disk = served(tmp_path / "fp8", tmp_path / "a")
    assert len(from_disk) == 2 * len(PROMPTS)
    assert from_disk == published(tmp_path, seed=3)


@pytest.mark.long
@pytest.mark.parametrize("model", ["qwen3-moe", "mixtral"])
def test_vllm_loads_a_converted_moe_and_answers_nearly_as_the_original(
    model: str, tmp_path: Path
) -> None:
    config: dict[str, Any] = checkpoint_files.config_of(
        model, head_dim=64, max_position_embeddings=512, num_hidden_layers=2, mlp_only_layers=[]
    )
    tensors = checkpoint_files.random_tensors(config)
    source = checkpoint_files.save(tmp_path / "source", config, tensors)
    convert_checkpoint(source, tmp_path / "fp8", ConvertOptions())
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", ConvertOptions(to="bf16"))
    fp8, back = (served(tmp_path / name, tmp_path / "x") for name in ("fp8", "back"))
    differences = []
    for (_, a), (_, b) in zip(fp8, back, strict=True):
        differences.append(abs(a[0] - b[0]))  # the first token's, before answers part
    assert max(differences) < 0.1
