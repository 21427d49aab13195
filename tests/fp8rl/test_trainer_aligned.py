"""trainer.precision=fp8-aligned: the trainer computes with the weights that the engine holds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.file import load_config, parse_config
from fp8rl.config.rollout import Activations
from fp8rl.config.run import RunConfig
from fp8rl.correction import correct
from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import ConfigError, TrainerError
from fp8rl.quant import (
    QuantizedTensor,
    QuantPlan,
    ScaleFormat,
    dequantize_blockwise,
    fake_quant,
    quantize_blockwise,
)
from fp8rl.report.words import describe
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config
from tests.fp8rl.aligned_worker import unevenness

VOCAB = 64
WORKER = Path(__file__).with_name("aligned_worker.py")
SHAPE = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 256, "init_std": 0.1}
QKV = "self_attention.linear_qkv.weight"


def config(precision: str = "fp8-aligned", **trainer: object) -> RunConfig:
    return parse_config(
        {
            "model": SHAPE,
            "trainer": {"precision": precision, "micro_batch_size": 4, **trainer},
            "rollout": {"precision": "fp8"},
        }
    )


def with_rollout(changed: RunConfig, **rollout: object) -> RunConfig:
    """The same run with other keys of its engine."""
    return parse_config(changed.model_dump() | {"rollout": {"precision": "fp8", **rollout}})


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(
        **changes,
        hf_config=hf_config(config().model, VOCAB, 64),
        precision="fp8",
        max_model_len=64,
        max_num_seqs=64,
        kv_cache_bytes=16 * 2**20,
    )


def make(precision: str = "fp8-aligned", **trainer: object) -> MegatronTrainer:
    return made_of(config(precision, **trainer), settings())


def made_of(run: RunConfig, engine: EngineSettings) -> MegatronTrainer:
    """A trainer whose heads differ in size, so that a block of the wrong rows gets wrong scales."""
    made = MegatronTrainer(run, VOCAB, engine.plan())
    state = made.state()
    for kind in ("model", "master"):
        for name in (n for n in state if n.startswith(f"{kind}/decoder.") and state[n].ndim == 2):
            state[name] = state[name] * unevenness(len(state[name]))
    made.load_state(state)
    return made


def batch(rows: int = 10, time: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (rows, time), generator=generator)
    return TokenBatch(tokens, (torch.arange(time) >= 4).expand(rows, time))


def mean_nll(b: TokenBatch):  # type: ignore[no-untyped-def]
    count = b.response_mask.sum()
    return lambda log_probs, rows: -log_probs.sum() / count


@pytest.fixture
def one_rank() -> Iterator[None]:
    with init_distributed(config()):
        yield


def with_fp8_weights(
    state: dict[str, Tensor], scale_format: ScaleFormat = "pow2"
) -> dict[str, Tensor]:
    """The state of a BF16 trainer whose decoder linears are what the engine holds.

    A fused q, k, v is taken apart here by its layout: for both kv heads two query heads, k, v.
    """

    def read_back(weight: Tensor) -> Tensor:
        return dequantize_blockwise(quantize_blockwise(weight, scale_format=scale_format))

    rounded = dict(state)
    for name, weight in state.items():
        if not name.startswith("model/decoder.") or weight.ndim != 2:
            continue
        if not name.endswith(QKV):
            rounded[name] = read_back(weight)
            continue
        heads = weight.split(64)
        q = read_back(torch.cat([heads[i] for i in (0, 1, 4, 5)])).split(64)
        k = read_back(torch.cat([heads[i] for i in (2, 6)])).split(64)
        v = read_back(torch.cat([heads[i] for i in (3, 7)])).split(64)
        rounded[name] = torch.cat([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    return rounded


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("scale_format", ["pow2", "fp32"])
def test_it_scores_as_a_bf16_trainer_would_that_held_the_engines_weights(
    scale_format: ScaleFormat,
) -> None:
    aligned, plain = made_of(config(), settings(scale_format=scale_format)), make("bf16")
    found, before = aligned.log_probs(batch()), plain.log_probs(batch())
    plain.load_state(with_fp8_weights(plain.state(), scale_format))
    assert torch.equal(found, plain.log_probs(batch()))
    assert not torch.equal(found, before)


@pytest.mark.usefixtures("one_rank")
def test_its_gradient_is_the_one_at_the_engines_weights_and_moves_the_masters() -> None:
    aligned, plain = make(), make("bf16")
    plain.load_state(with_fp8_weights(plain.state()))
    masters = {n: t for n, t in aligned.state().items() if n.startswith("master/")}
    assert aligned.update(batch(), mean_nll(batch())) == plain.update(batch(), mean_nll(batch()))
    found, expected = aligned.state(), plain.state()
    for name, master in masters.items():
        moment = name.replace("master/", "adam/exp_avg/")
        assert torch.equal(found[moment], expected[moment]), name
        assert not torch.equal(found[name], master), name
        assert torch.equal(found[name.replace("master/", "model/")], found[name].bfloat16()), name


@pytest.mark.usefixtures("one_rank")
def test_its_state_is_that_of_a_bf16_trainer_and_continues_bitwise() -> None:
    aligned, plain, b = make(), make("bf16"), batch()
    assert {n: t.shape for n, t in aligned.state().items()} == {
        n: t.shape for n, t in plain.state().items()
    }
    aligned.update(b, mean_nll(b))
    saved = aligned.state()
    expected = [aligned.update(b, mean_nll(b)) for _ in range(2)]
    resumed = make()
    resumed.load_state(saved)
    assert [resumed.update(b, mean_nll(b)) for _ in range(2)] == expected
    assert all(torch.equal(t, resumed.state()[n]) for n, t in aligned.state().items())
    plain.load_state(saved)  # going on in BF16 is possible, and another thing
    assert plain.update(b, mean_nll(b)) != expected[0]


@pytest.mark.usefixtures("one_rank")
def test_it_learns() -> None:
    aligned, b = make(), batch()
    losses = [aligned.update(b, mean_nll(b), learning_rate=3e-3)["loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.usefixtures("one_rank")
def test_weights_are_quantized_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    real, names = fake_quant.quantize_blockwise, []

    def counted(weight: Tensor, *, name: str, **options: object) -> QuantizedTensor:
        names.append(name)
        return real(weight, name=name, **options)  # type: ignore[arg-type]

    aligned = make(micro_batch_size=3)
    monkeypatch.setattr(fake_quant, "quantize_blockwise", counted)
    planned = [e.name for e in settings().plan().entries if e.quantized]
    aligned.log_probs(batch())
    assert sorted(names) == sorted(planned)
    names.clear()
    aligned.update(batch(), mean_nll(batch()))
    assert sorted(names) == sorted(planned)


@pytest.mark.usefixtures("one_rank")
def test_it_needs_the_engines_plan() -> None:
    with pytest.raises(TrainerError, match=r"fp8-aligned; give the engine's QuantPlan"):
        MegatronTrainer(config(), VOCAB)


def token_batch(prompts: list[list[int]], groups: list[list[Sample]]) -> tuple[TokenBatch, Tensor]:
    """Prompts with their responses, and the behaviour log-probs where the responses are."""
    rows = [(p, s) for p, group in zip(prompts, groups, strict=True) for s in group]
    width = max(len(p) + len(s.tokens) for p, s in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, behaviour = torch.zeros(len(rows), width, dtype=torch.bool), torch.zeros(len(rows), width)
    for row, (prompt, sample) in enumerate(rows):
        here = slice(len(prompt), len(prompt) + len(sample.tokens))
        tokens[row, : here.start] = torch.tensor(prompt)
        tokens[row, here] = torch.tensor(sample.tokens)
        mask[row, here], behaviour[row, here] = True, torch.tensor(sample.logprobs)
    return TokenBatch(tokens, mask), behaviour


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("activations", [None, "fp8"])
def test_its_mismatch_with_the_real_engine_is_far_below_that_of_a_bf16_trainer(
    activations: Activations | None, tmp_path: Path
) -> None:
    """With W8A8 also below that of a trainer that is aligned with the weights alone.

    What is left there is its own noise: an input that differs in its last BF16 bit falls on the
    other side of a rounding now and then, and moves by a whole FP8 step.
    """
    engine_settings, plain = settings(activations=activations), config("bf16", micro_batch_size=64)
    weights_alone = config(micro_batch_size=64)
    aligned = with_rollout(weights_alone, activations=activations)
    configs = {"bf16": plain, "weights alone": weights_alone, "aligned": aligned}
    trainers = {name: made_of(run, engine_settings) for name, run in configs.items()}
    prompts = [[2 + (i * k) % 60 for i in range(1, 9)] for k in range(1, 33)]
    sampling = Sampling(max_tokens=24, stop_token=1, samples=4)
    plan = engine_settings.plan()
    with RolloutEngine(engine_settings, tmp_path) as engine, Publisher(plan, engine) as publisher:
        publisher.publish(trainers["aligned"].source(), version=0, kv_scales=None)
        groups = engine.generate(prompts, version=0, sampling=sampling, seed=5)
    b, behaviour = token_batch(prompts, groups)
    k3 = {}
    for name, trainer in trainers.items():
        found = correct([], trainer.log_probs(b), behaviour, b.response_mask).metrics()
        k3[name] = found["rollout_corr/k3_kl"]
    assert int(b.response_mask.sum()) > 2000
    assert k3["bf16"] > 1e-4, "FP8 weights must show"
    if activations == "fp8":
        assert k3["aligned"] < 0.4 * k3["bf16"], k3
        assert k3["aligned"] < 0.75 * k3["weights alone"], k3
    else:
        assert k3["aligned"] < 0.25 * k3["bf16"], k3
        assert k3["aligned"] == k3["weights alone"]


@pytest.mark.slow
@pytest.mark.long
def test_on_two_tensor_parallel_ranks_the_bytes_are_the_published_ones(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(tmp_path), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2)]
    sent = load_file(tmp_path / "sent.safetensors")

    def published(name: str) -> Tensor:
        name = f"model.layers.0.{name}.weight"
        q = QuantizedTensor(sent[name], sent[f"{name}_scale_inv"], (128, 128), "pow2")
        return dequantize_blockwise(q)

    q, k, v = (published(f"self_attn.{x}_proj").split(64) for x in "qkv")
    gate, up = (published(f"mlp.{x}_proj").chunk(2) for x in ("gate", "up"))
    for rank, found in enumerate(ranks):
        groups = [[q[2 * g], q[2 * g + 1], k[g], v[g]] for g in (2 * rank, 2 * rank + 1)]
        assert torch.equal(found["linear_qkv"], torch.cat([*groups[0], *groups[1]]))
        assert torch.equal(found["linear_fc1"], torch.cat([gate[rank], up[rank]]))
        for name, hf in {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}.items():
            assert torch.equal(found[name], published(hf).chunk(2, 1)[rank])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.precision=bf16", "rollout.precision is bf16: the engine has no FP8 weights"),
        ("trainer.tensor_parallel=2", "num_kv_heads x head_dim must be a multiple of 256.*is 128"),
        ("trainer.precision=fp8", "trainer.precision: .*'fp8-aligned'.*found 'fp8'"),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_anything_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {precision: fp8-aligned}")
    assert load_config(path).trainer.precision == "fp8-aligned"
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_the_title_of_a_run_says_it() -> None:
    titles = [describe(config(p).model_dump(mode="json")) for p in ("fp8-aligned", "bf16")]
    assert titles[0].startswith("FP8 weights, BF16 KV cache, FP8-aligned trainer, correction")
    assert "trainer" not in titles[1]


def test_the_plan_is_the_engines() -> None:
    assert settings().plan() == QuantPlan.from_hf_config(settings().hf_config)
