"""A policy with experts: its configuration, the real Megatron model beside the real Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fp8rl.batch import TokenBatch
from fp8rl.config.file import load_config, parse_config
from fp8rl.config.model import ModelConfig
from fp8rl.config.run import RunConfig
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import ConfigError
from fp8rl.quant import QuantPlan, QuantPlanError, dequantize_blockwise, quantize_blockwise
from fp8rl.report.words import describe
from fp8rl.sync.source import IterableSource, encoded
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_cpu import EXPERT_ROWS, cpu_stands_in
from fp8rl.trainer.megatron_model import hf_config
from tests.fp8rl.test_trainer_aligned import with_fp8_weights

VOCAB = 64
SHAPE = {
    "family": "qwen3_moe",
    "num_layers": 2,
    "hidden_size": 128,
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_ffn_hidden_size": 128,
    "init_std": 0.1,  # large, so that what attention and the experts compute shows in the logits
}
ROUTER = "model.layers.0.mlp.gate.weight"


def config(trainer: dict[str, object] | None = None, **rollout: object) -> RunConfig:
    given = {"micro_batch_size": 4, "grad_clip": 1e9, **(trainer or {})}
    return parse_config({"model": SHAPE, "trainer": given, "rollout": rollout})


def batch(rows: int = 10, time: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (rows, time), generator=generator)
    lengths = torch.randint(6, time + 1, (rows, 1), generator=generator)
    return TokenBatch(tokens, (torch.arange(time) >= 4) & (torch.arange(time) < lengths))


def mean_nll(b: TokenBatch):  # type: ignore[no-untyped-def]
    count = b.response_mask.sum()
    return lambda log_probs, rows: -log_probs.sum() / count


def plan(**choices: object) -> QuantPlan:
    shape = ModelConfig.model_validate(SHAPE)
    return QuantPlan.from_hf_config(hf_config(shape, VOCAB, 64), **choices)  # type: ignore[arg-type]


@pytest.fixture
def trainer() -> Iterator[MegatronTrainer]:
    with init_distributed(config()):
        yield MegatronTrainer(config(), VOCAB)


class HuggingFaceTwin:
    """The real Qwen3MoeForCausalLM of the trainer's exported weights, in its precision."""

    def __init__(self, trainer: MegatronTrainer) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = AutoConfig.for_model(**hf_config(config().model, VOCAB, 64))
        shape._experts_implementation = "eager"
        self.model = AutoModelForCausalLM.from_config(shape).bfloat16()
        assert type(self.model).__name__ == "Qwen3MoeForCausalLM"
        weights = dict(trainer.source())
        for name, found in self.model.state_dict().items():  # experts are stacked there
            found.copy_(_stacked(name, weights))

    def log_probs(self, b: TokenBatch) -> Tensor:
        logits = self.model(b.tokens).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, b.tokens[:, 1:, None]).squeeze(-1)
        return torch.where(b.response_mask, nn.functional.pad(chosen, (1, 0)), 0.0)


def _stacked(name: str, weights: dict[str, Tensor]) -> Tensor:
    """A tensor of transformers' model from those of a checkpoint."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return weights[name]
    prefix, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return torch.stack(
        [
            torch.cat([weights[f"{prefix}.{expert}.{part}.weight"] for part in parts])
            for expert in range(SHAPE["num_experts"])  # type: ignore[call-overload]
        ]
    )


def test_log_probs_are_those_of_the_real_qwen3_moe(trainer: MegatronTrainer) -> None:
    b = batch()
    ours = trainer.log_probs(b)
    with torch.no_grad():
        theirs = HuggingFaceTwin(trainer).log_probs(b)
    apart = (ours - theirs)[b.response_mask].abs()
    assert theirs[b.response_mask].std() > 0.5  # the model is not a uniform one
    assert apart.median() < 0.02  # a few tokens go to another expert, for logits round otherwise
    assert apart.mean() < 0.05


def test_gradient_is_that_of_the_real_qwen3_moe(trainer: MegatronTrainer) -> None:
    b, twin = batch(), HuggingFaceTwin(trainer)
    loss = mean_nll(b)(twin.log_probs(b), slice(0, 10))
    loss.backward()
    theirs = {name: p.grad for name, p in twin.model.named_parameters()}
    norm = torch.stack([grad.float().norm() for grad in theirs.values()]).norm()
    found = trainer.update(b, mean_nll(b))
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=0.01)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=0.05)
    state = trainer.state()
    ours = state["adam/exp_avg/decoder.layers.0.mlp.router.weight"] * 10
    expected = theirs[ROUTER].float()
    assert (ours - expected).norm() < 0.3 * expected.norm()
    assert ours.norm() == pytest.approx(float(expected.norm()), rel=0.1)


def test_routes_are_what_the_exported_router_says(trainer: MegatronTrainer) -> None:
    b, twin = batch(), HuggingFaceTwin(trainer)
    with torch.no_grad():
        logits = twin.model(b.tokens, output_router_logits=True).router_logits
    expected = torch.stack([x.topk(2).indices.view(10, 12, 2) for x in logits], dim=2)
    routes = trainer.observe_routes(b)
    assert routes.shape == (10, 12, 2, 2)
    assert (routes == expected).double().mean() > 0.95, "first and second choice, in order"
    assert len(routes.unique()) == 4
    assert (routes[..., 0] != routes[..., 1]).all()


def test_filling_up_an_expert_changes_nothing(trainer: MegatronTrainer) -> None:
    experts = trainer._model.decoder.layers[0].mlp.experts.local_experts
    generator = torch.Generator().manual_seed(2)
    for count in (0, 1, EXPERT_ROWS - 1, EXPERT_ROWS, EXPERT_ROWS + 1):
        tokens = torch.randn(count, 128, generator=generator).bfloat16()
        weights = torch.rand(count, generator=generator).bfloat16()
        with torch.no_grad(), cpu_stands_in():
            padded, _ = experts[0](tokens, weights)
            plain, _ = type(experts[0]).forward(experts[0], tokens, weights)
        assert padded.shape == (count, 128)
        assert torch.allclose(padded, plain, rtol=0.02, atol=1e-4)


def test_a_state_continues_bitwise(trainer: MegatronTrainer) -> None:
    b = batch()
    trainer.update(b, mean_nll(b))
    saved = trainer.state()
    expected = trainer.update(b, mean_nll(b))
    resumed = MegatronTrainer(config().model_copy(update={"seed": 5}), VOCAB)
    resumed.load_state(saved)
    assert resumed.update(b, mean_nll(b)) == expected


def test_the_router_stays_bf16_in_the_plan_and_the_experts_do_not() -> None:
    routers = [e for e in plan().entries if ".mlp.gate." in e.name]
    experts = [e for e in plan().entries if ".mlp.experts." in e.name]
    assert len(routers) == 2 and len(experts) == 2 * 4 * 3
    assert all(not e.quantized and not e.rounded and e.dtype == torch.bfloat16 for e in routers)
    assert all(e.quantized for e in experts)
    told = plan().quantization_config()
    assert told is not None and "model.layers.1.mlp.gate" in told["modules_to_not_convert"]


def test_a_rounded_router_is_sent_in_bf16_with_what_fp8_leaves_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        entry.name: torch.randn(entry.shape, generator=generator).bfloat16()
        for entry in plan().entries
    }
    source = IterableSource(weights)
    plain = dict(encoded(source, plan(), to=[0]))
    rounded = dict(encoded(source, plan(router="fp8-rounded"), to=[0]))
    expected = dequantize_blockwise(quantize_blockwise(weights[ROUTER]))
    assert torch.equal(plain[ROUTER], weights[ROUTER])  # type: ignore[arg-type]
    assert torch.equal(rounded[ROUTER], expected)  # type: ignore[arg-type]
    assert not torch.equal(expected, weights[ROUTER])
    for name in weights.keys() - {ROUTER, ROUTER.replace("0", "1")}:
        ours, theirs = (
            getattr(tensors[name], "data", tensors[name]) for tensors in (plain, rounded)
        )
        assert torch.equal(ours, theirs), name
    assert plan().engine_tensors() == plan(router="fp8-rounded").engine_tensors()
    assert plan().quantization_config() == plan(router="fp8-rounded").quantization_config()


def test_an_aligned_trainer_computes_as_an_engine_whose_routers_are_rounded() -> None:
    rollout = {"precision": "fp8", "router": "fp8-rounded"}
    with init_distributed(config()):
        aligned = MegatronTrainer(
            config({"precision": "fp8-aligned"}, **rollout), VOCAB, plan(router="fp8-rounded")
        )
        plain = MegatronTrainer(config(), VOCAB)
        before = plain.observe_routes(batch())
        plain.load_state(with_fp8_weights(plain.state()))  # routers, experts, attention
        assert torch.equal(aligned.observe_routes(batch()), plain.observe_routes(batch()))
        assert torch.equal(aligned.log_probs(batch()), plain.log_probs(batch()))
        assert not torch.equal(before, plain.observe_routes(batch()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_experts=null"], "model: family qwen3_moe needs num_experts"),
        (["model.family=qwen3"], "num_experts, experts_per_token, moe_ffn_hidden_size given, but"),
        (["model.experts_per_token=9"], r"experts_per_token is 9, more than num_experts \(4\)"),
        (["model.moe_ffn_hidden_size=200"], "moe_ffn_hidden_size is 200.*use 256"),
        (["trainer.expert_parallel=2"], r"expert_parallel is 2.*tensor_parallel \(1\).*use 1"),
        (
            ["trainer.expert_parallel=2", "trainer.tensor_parallel=2", "model.num_experts=3"],
            r"expert_parallel is 2.*num_experts \(3\)",
        ),
        (["trainer.expert_parallel=0"], "trainer.expert_parallel"),
        (["rollout.router=fp8"], "rollout.router: .*'fp8-rounded'.*found 'fp8'"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    lines = [f"  {key}: {value}" for key, value in SHAPE.items()]
    path.write_text("\n".join(["model:", *lines]))
    assert load_config(path).model.is_moe
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_routers_and_expert_parallelism_are_for_models_with_experts() -> None:
    with pytest.raises(ConfigError, match=r"rollout.router is fp8-rounded.*family qwen3 has no"):
        parse_config({"rollout": {"router": "fp8-rounded"}})
    with pytest.raises(ConfigError, match=r"trainer.expert_parallel is 2.*qwen3 has no experts"):
        parse_config({"trainer": {"expert_parallel": 2, "tensor_parallel": 2}})
    with pytest.raises(QuantPlanError, match="no experts and no router"):
        QuantPlan.from_hf_config(hf_config(ModelConfig(), VOCAB, 64), router="fp8-rounded")


def test_rounded_routers_are_said_in_the_title_of_a_run() -> None:
    titles = [describe(config(router=r).model_dump(mode="json")) for r in ("bf16", "fp8-rounded")]
    assert "routers rounded to FP8" in titles[1] and "router" not in titles[0]
    settings = EngineSettings(
        hf_config=hf_config(config().model, VOCAB, 64),
        precision="fp8",
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_bytes=2**24,
        router="fp8-rounded",
    )
    assert settings.plan() == plan(router="fp8-rounded")


def test_the_example_is_a_run_with_experts() -> None:
    example = load_config(Path(__file__).parents[2] / "examples" / "grpo_moe.yaml")
    assert example.model.is_moe and example.rollout.precision == "fp8-kv"
    assert example.rollout.router == "bf16"
