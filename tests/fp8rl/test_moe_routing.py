"""Engine and trainer choose the same experts: the measure, and the two real parts under it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.engine.rollout import RolloutEngine, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError, StaleWeightsError
from fp8rl.quant import dequantize_blockwise, quantize_blockwise
from fp8rl.routing import agreement, compare_routes
from fp8rl.sync.publisher import Publisher
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

VOCAB = 64
LAYERS = 2
LINEARS = tuple(f"linear_{x}.weight" for x in ("qkv", "proj", "fc1", "fc2"))


def config(**rollout: object) -> RunConfig:
    shape = {
        "family": "qwen3_moe",
        "num_layers": LAYERS,
        "num_experts": 8,
        "experts_per_token": 2,
        "moe_ffn_hidden_size": 128,
        "init_std": 0.06,
    }
    return parse_config({"model": shape, "rollout": rollout})


def settings(precision: str = "bf16") -> EngineSettings:
    return EngineSettings(
        hf_config=hf_config(config().model, VOCAB, 64),
        precision=precision,  # type: ignore[arg-type]
        max_model_len=64,
        max_num_seqs=64,
        kv_cache_bytes=2**24,
    )


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCAB, (40, 24), generator=generator)
    lengths = torch.randint(8, 25, (40, 1), generator=generator)
    return TokenBatch(tokens, (torch.arange(24) >= 4) & (torch.arange(24) < lengths))


def fp8_of(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The state with the weights whose name ends so as blockwise FP8 leaves them."""
    return {
        name: dequantize_blockwise(quantize_blockwise(weight))
        if name.startswith("model/decoder.") and name.endswith(names)
        else weight
        for name, weight in state.items()
    }


@st.composite
def routes(draw: st.DrawFn, experts: int = 6, k: int = 3) -> Tensor:
    tokens, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    scores = torch.rand(tokens, layers, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k).indices


@given(routes())
def test_equal_routes_agree_wholly_and_disjoint_ones_not_at_all(chosen: Tensor) -> None:
    found = agreement(chosen, chosen)
    assert found["router/agreement"] == found["router/top1_agreement"] == 1.0
    assert all(found[f"router/agreement/{n}"] == 1.0 for n in range(chosen.shape[1]))
    assert found["router/tokens"] == len(chosen)
    assert agreement(chosen, chosen + 100)["router/agreement"] == 0.0


@given(routes(), st.permutations(range(3)))
def test_the_order_of_the_experts_counts_for_the_first_choice_alone(
    chosen: Tensor, order: list[int]
) -> None:
    found = agreement(chosen, chosen[..., order])
    assert found["router/agreement"] == 1.0
    assert found["router/top1_agreement"] == float(order[0] == 0)


def test_one_other_expert_of_k_is_one_kth_of_a_token_in_its_layer() -> None:
    ours = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    theirs = torch.tensor([[[0, 1], [2, 5]], [[0, 1], [3, 2]]])
    found = agreement(ours, theirs)
    assert found["router/agreement"] == 7 / 8
    assert found["router/top1_agreement"] == 3 / 4
    assert (found["router/agreement/0"], found["router/agreement/1"]) == (1.0, 3 / 4)


@dataclass
class Parts:
    trainer: MegatronTrainer
    engine: RolloutEngine
    version: int = -1

    def publish(self, *, router: str = "bf16") -> None:
        plan = replace(self.engine.settings, router=router).plan()  # type: ignore[arg-type]
        self.version += 1
        with Publisher(plan, self.engine) as publisher:
            publisher.publish(self.trainer.source(), version=self.version, kv_scales=None)

    def agreement(self) -> float:
        found = compare_routes(self.trainer, self.engine, batch(), self.version)
        assert found["router/tokens"] > 400
        return float(found["router/agreement"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """A trainer, and a BF16 engine of its model."""
    with (
        init_distributed(config()),
        RolloutEngine(settings(), tmp_path_factory.mktemp("engine")) as engine,
    ):
        yield Parts(MegatronTrainer(config(), VOCAB), engine)


@pytest.mark.slow
def test_the_same_weights_choose_the_same_experts_and_rounded_ones_others(parts: Parts) -> None:
    trainer = parts.trainer
    parts.publish()
    same = parts.agreement()
    assert same > 0.99  # the rest are ties of BF16 logits

    parts.publish(router="fp8-rounded")  # proven by the engine, as all that is published
    rounded = parts.agreement()
    assert 0.5 < rounded < 0.99 and rounded < same - 0.01
    before = trainer.state()
    trainer.load_state(fp8_of(before, "router.weight"))
    assert parts.agreement() > 0.99, "the engine holds what FP8 leaves of the routers"
    trainer.load_state(fp8_of(before, *LINEARS))
    parts.publish()
    assert parts.agreement() > 0.99
    trainer.load_state(before)
    linears = parts.agreement()
    assert 0.5 < linears < same - 0.01, "FP8 linears change what routers see"


@pytest.mark.slow
def test_routes_are_those_of_each_sequence_whole_whatever_is_cached(parts: Parts) -> None:
    parts.publish()
    sequences = [list(range(2, 12)), list(range(2, 9)), list(range(20, 50)), list(range(2, 12))]
    first = parts.engine.observe_routes(sequences, version=parts.version)
    assert [tuple(x.shape) for x in first] == [(len(s), LAYERS, 2) for s in sequences]
    again = parts.engine.observe_routes(sequences[::-1], version=parts.version)[::-1]
    for one, other in zip(first, again, strict=True):
        assert (one == other).double().mean() > 0.95
    shared = (first[0][:7] == first[1]).double().mean()
    assert shared > 0.95, "the same tokens after the same prefix"


@pytest.mark.slow
def test_an_engine_shows_no_routes_of_another_version_or_beside_requests(parts: Parts) -> None:
    parts.publish()
    with pytest.raises(StaleWeightsError, match=f"version {parts.version + 1} were asked for"):
        parts.engine.observe_routes([[2, 3]], version=parts.version + 1)
    sampling = Sampling(max_tokens=20, stop_token=1)
    ticket = parts.engine.submit([[2, 3]], version=parts.version, sampling=sampling, seed=0)
    with pytest.raises(EngineError, match="in flight; collect them before the engine shows"):
        parts.engine.observe_routes([[2, 3]], version=parts.version)
    [[answer]] = parts.engine.collect(ticket)
    assert len(parts.engine.observe_routes([[2, 3]], version=parts.version)[0]) == 2
    [[same]] = parts.engine.generate([[2, 3]], version=parts.version, sampling=sampling, seed=0)
    assert same.tokens == answer.tokens  # no hook stays behind, and nothing is in the way
