"""MegatronTrainer on the real megatron-core, one rank: scoring, stepping, observing, resuming."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.errors import TrainerError
from fp8rl.quant import KVObservation, KVObserver
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

VOCAB = 64
SHAPE = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "init_std": 0.1,  # large, so that what attention and the MLP compute shows in the logits
}
QWEN2 = {"family": "qwen2", "hidden_size": 256, "init_std": 0.07}  # wider, so smaller weights
SHAPES = {"qwen3": SHAPE, "qwen2": SHAPE | QWEN2}


def config(family: str = "qwen3", **trainer: object) -> RunConfig:
    return parse_config(
        {
            "model": SHAPES[family],
            "trainer": {"micro_batch_size": 4, **trainer},
            "rollout": {"temperature": 0.8},
        }
    )


def batch(rows: int = 10, time: int = 12, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, time), generator=generator)
    lengths = torch.randint(6, time + 1, (rows, 1), generator=generator)
    positions = torch.arange(time)
    return TokenBatch(tokens, (positions >= 4) & (positions < lengths))


def with_other_padding(b: TokenBatch) -> TokenBatch:
    return TokenBatch(torch.where(b.real, b.tokens, (b.tokens + 17) % VOCAB), b.response_mask)


def mean_nll(b: TokenBatch):  # type: ignore[no-untyped-def]
    count = b.response_mask.sum()
    return lambda log_probs, rows: -log_probs.sum() / count


def gradients(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """Adam's first moment after one step from zero is 0.1 times the (clipped) gradient."""
    moment = "adam/exp_avg/"
    state = trainer.state()
    return {n.removeprefix(moment): 10 * t for n, t in state.items() if n.startswith(moment)}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with init_distributed(config()):
        yield


@pytest.fixture
def trainer() -> MegatronTrainer:
    return MegatronTrainer(config(), VOCAB)


def make(family: str, **options: object) -> MegatronTrainer:
    """A trainer of that family; its biases, where it has any, are not zero."""
    made = MegatronTrainer(config(family, **options), VOCAB)
    state, generator = made.state(), torch.Generator().manual_seed(1)
    for name in (n for n in state if n.startswith("master/") and n.endswith(".bias")):
        state[name] = torch.randn(state[name].shape, generator=generator)
        state[name.replace("master/", "model/")] = state[name].bfloat16()
    made.load_state(state)
    return made


class HuggingFaceTwin:
    """The real Qwen3ForCausalLM or Qwen2ForCausalLM of the trainer's exported weights, in fp32."""

    def __init__(self, trainer: MegatronTrainer) -> None:
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        shape = AutoConfig.for_model(**hf_config(trainer._config.model, VOCAB, 64))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def observed(module, q, k, v, mask, **kwargs):  # type: ignore[no-untyped-def]
            self.seen.append((q, k, v))
            return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

        AttentionInterface.register("observed", observed)
        shape._attn_implementation = "observed"
        self.model = AutoModelForCausalLM.from_config(shape).float()
        weights = {name: tensor.float() for name, tensor in trainer.source()}
        self.model.load_state_dict(weights, strict=True)

    def log_probs(self, b: TokenBatch) -> Tensor:
        logits = self.model(b.tokens).logits[:, :-1] / config().rollout.temperature
        chosen = logits.log_softmax(-1).gather(-1, b.tokens[:, 1:, None]).squeeze(-1)
        padded = torch.nn.functional.pad(chosen, (1, 0))
        return torch.where(b.response_mask, padded, 0.0)


@pytest.mark.parametrize("family", SHAPES)
def test_log_probs_are_those_of_the_exported_hugging_face_model(family: str) -> None:
    trainer, b = make(family), batch()
    ours = trainer.log_probs(b)
    with torch.no_grad():
        theirs = HuggingFaceTwin(trainer).log_probs(b)
    assert ours.dtype == torch.float32 and ours.shape == b.tokens.shape
    assert theirs[b.response_mask].std() > 0.5  # the model is not a uniform one
    assert (ours - theirs)[b.response_mask].abs().mean() < 0.02
    assert (ours - theirs).abs().max() < 0.15
    assert (ours[~b.response_mask] == 0).all()


def test_entropies_are_those_of_the_exported_hugging_face_model() -> None:
    trainer, b = make("qwen3"), batch()
    scores = trainer.score(b)
    assert torch.equal(scores.logprobs, trainer.log_probs(b))
    with torch.no_grad():
        logits = HuggingFaceTwin(trainer).model(b.tokens).logits[:, :-1]
    spread = torch.distributions.Categorical(logits=logits / config().rollout.temperature)
    theirs = torch.nn.functional.pad(spread.entropy(), (1, 0))
    assert scores.entropy is not None
    assert (scores.entropy - theirs)[b.response_mask].abs().max() < 0.05
    assert theirs[b.response_mask].std() > 0.05  # not one entropy for all
    assert (scores.entropy[~b.response_mask] == 0).all()


def test_padding_changes_no_bit_and_gives_no_nan(trainer: MegatronTrainer) -> None:
    b = batch()
    other = with_other_padding(b)
    assert not torch.equal(b.tokens, other.tokens)
    assert torch.equal(trainer.log_probs(b), trainer.log_probs(other))
    assert trainer.log_probs(b).isfinite().all()


def test_a_token_sees_only_those_before_it(trainer: MegatronTrainer) -> None:
    b = batch()
    tokens = b.tokens.clone()
    tokens[:, 8] = (tokens[:, 8] + 1) % VOCAB
    before, after = trainer.log_probs(b), trainer.log_probs(TokenBatch(tokens, b.response_mask))
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("family", SHAPES)
def test_gradient_is_that_of_the_hugging_face_model(family: str) -> None:
    trainer = make(family, grad_clip=1e9)
    twin, b = HuggingFaceTwin(trainer), batch()
    loss = mean_nll(b)(twin.log_probs(b), slice(0, 10))
    loss.backward()
    theirs = {name: p.grad for name, p in twin.model.named_parameters()}
    norm = torch.stack([grad.norm() for grad in theirs.values()]).norm()

    found = trainer.update(b, mean_nll(b))
    ours = gradients(trainer)
    assert found["loss"] == pytest.approx(float(loss.detach()), rel=0.01)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=0.02)
    attention, hf_attention = "decoder.layers.0.self_attention", "model.layers.0.self_attn"
    expected = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        f"{attention}.linear_proj.weight": theirs[f"{hf_attention}.o_proj.weight"],
        "decoder.layers.1.mlp.linear_fc2.weight": theirs["model.layers.1.mlp.down_proj.weight"],
    }
    if family == "qwen3":
        norm_of_q = theirs[f"{hf_attention}.q_norm.weight"]
        expected[f"{attention}.q_layernorm.weight"] = norm_of_q
    else:
        q, k, v = (theirs[f"{hf_attention}.{x}_proj.bias"].split(64) for x in "qkv")
        bias = torch.cat([*q[:2], k[0], v[0], *q[2:], k[1], v[1]])
        expected[f"{attention}.linear_qkv.bias"] = bias
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    b = batch()
    results, moments = [], []
    for size in (3, 10):  # 3 does not divide 10: the last micro-batch is filled up
        trainer = MegatronTrainer(config(micro_batch_size=size), VOCAB)
        results.append(trainer.update(b, mean_nll(b)))
        moments.append(gradients(trainer))
    assert results[0] == pytest.approx(results[1], rel=5e-3)
    for name, whole in moments[1].items():
        assert (moments[0][name] - whole).norm() < 0.02 * whole.norm(), name


def test_the_loss_sees_every_real_row_once(trainer: MegatronTrainer) -> None:
    b, seen = batch(), []

    def loss_fn(log_probs: Tensor, rows: slice) -> Tensor:
        assert log_probs.shape == (rows.stop - rows.start, 12)
        seen.extend(range(rows.start, rows.stop))
        return log_probs.sum() * 0.0 + 0.125

    assert trainer.update(b, loss_fn)["loss"] == pytest.approx(3 * 0.125)
    assert seen == list(range(10))


def test_training_lowers_the_loss_at_the_rate_asked_for(trainer: MegatronTrainer) -> None:
    b = batch()
    start = trainer.state()
    first = trainer.update(b, mean_nll(b), learning_rate=0.0)
    stood = trainer.state()
    assert all(torch.equal(start[n], stood[n]) for n in start if n.startswith("master/"))
    for _ in range(5):
        last = trainer.update(b, mean_nll(b), learning_rate=3e-3)
    assert last["loss"] < first["loss"] - 0.5


def test_continuing_from_a_saved_state_is_bitwise_the_same(trainer: MegatronTrainer) -> None:
    b = batch()
    trainer.update(b, mean_nll(b))
    stored = save(trainer.state())  # through the bytes of a safetensors file
    expected = [trainer.update(b, mean_nll(b)) for _ in range(2)]
    draw = torch.rand(3)

    resumed = MegatronTrainer(config().model_copy(update={"seed": 5}), VOCAB)
    resumed.load_state(load(stored))
    assert [resumed.update(b, mean_nll(b)) for _ in range(2)] == expected
    assert torch.equal(torch.rand(3), draw)
    ours, theirs = resumed.state(), trainer.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "rng/torch")


def test_weights_are_the_masters_in_bf16(trainer: MegatronTrainer) -> None:
    b = batch()
    trainer.update(b, mean_nll(b))
    state = trainer.state()
    masters = {n.removeprefix("master/"): t for n, t in state.items() if n.startswith("master/")}
    assert all(t.dtype == torch.float32 for t in masters.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())
    assert all(torch.equal(state[f"model/{n}"], t.bfloat16()) for n, t in masters.items())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_refused_and_changes_nothing(
    trainer: MegatronTrainer, poison: float
) -> None:
    b = batch()
    before = trainer.state()
    with pytest.raises(TrainerError, match=r"gradient norm is (nan|inf)"):
        trainer.update(b, lambda log_probs, rows: log_probs.sum() * poison)
    after = trainer.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.update(b, mean_nll(b))["grad_norm"] > 0  # and nothing of it lingers


def test_a_state_of_another_model_is_refused(trainer: MegatronTrainer) -> None:
    state = trainer.state()
    missing = {n: t for n, t in state.items() if n != "adam/step"}
    with pytest.raises(TrainerError, match="adam/step"):
        trainer.load_state(missing)
    name = "master/decoder.layers.1.mlp.linear_fc1.weight"
    with pytest.raises(TrainerError, match=name):
        trainer.load_state({**state, name: state[name][:-1]})


def observed(trainer: MegatronTrainer, b: TokenBatch) -> KVObservation:
    return trainer.observe_kv(b, KVObserver(trainer.attention_shape))


def test_what_is_observed_is_what_the_hugging_face_model_attends_to(
    trainer: MegatronTrainer,
) -> None:
    b = batch()
    ours = observed(trainer, b)
    twin = HuggingFaceTwin(trainer)
    with torch.no_grad():
        twin.model(b.tokens)
    mask = b.real[:, None, :, None]
    theirs = torch.tensor([[float((x.abs() * mask).max()) for x in qkv] for qkv in twin.seen])
    assert ours.tokens == int(b.lengths.sum())
    assert ours.amax().shape == (2, 3)
    assert torch.allclose(ours.amax(), theirs, rtol=0.02)


def test_padding_is_never_observed(trainer: MegatronTrainer) -> None:
    b = batch()
    seen = observed(trainer, b)
    assert seen.to_json() == observed(trainer, with_other_padding(b)).to_json()
    everything = TokenBatch(b.tokens, (torch.arange(12) > 0).expand(10, 12))
    wider = observed(trainer, everything).amax()
    assert (wider >= seen.amax()).all()
    assert not torch.equal(wider, seen.amax())  # padding would have shown


def test_scoring_can_be_watched_in_its_first_micro_batch_and_gives_the_same_scores(
    trainer: MegatronTrainer,
) -> None:
    b = batch()
    scores = trainer.log_probs(b)
    observer = KVObserver(trainer.attention_shape)
    assert torch.equal(trainer.log_probs(b, observer), scores)
    first = b.lengths[:4].clamp(max=b.tokens.shape[1] - 1)  # the last column predicts nothing
    assert observer.observation().tokens == int(first.sum())
    assert torch.equal(trainer.log_probs(b), scores)
    assert observer.observation().tokens == int(first.sum())


def test_a_seed_is_a_model_and_building_it_draws_nothing(trainer: MegatronTrainer) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    same = dict(MegatronTrainer(config(), VOCAB).source())
    assert torch.equal(torch.rand(2), expected)
    other = dict(MegatronTrainer(config().model_copy(update={"seed": 1}), VOCAB).source())
    weights = dict(trainer.source())
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])
    assert float(weights["lm_head.weight"].float().std()) == pytest.approx(0.1, rel=0.05)
