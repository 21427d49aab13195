"""The residual stream on its way, what a cache gives back, and layers given another's stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.quant import E4M3_MAX, KVScales
from fp8rl.sync.errors import StreamError
from fp8rl.sync.streams import StreamObservation, pack, unpack
from fp8rl.sync.streams_megatron import MegatronStreams, through_cache
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer

VOCAB, LAYERS = 64, 3
CODES = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448


def config() -> RunConfig:
    shape = {"num_layers": LAYERS, "hidden_size": 128, "ffn_hidden_size": 256, "init_std": 0.1}
    return parse_config({"model": shape, "trainer": {"micro_batch_size": 4}})


@pytest.fixture
def trainer() -> Iterator[MegatronTrainer]:
    with init_distributed(config()):
        yield MegatronTrainer(config(), VOCAB)


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (6, 10), generator=generator)
    return TokenBatch(tokens, (torch.arange(10) >= 3).expand(6, 10))


def streams(trainer: MegatronTrainer, given: torch.Tensor | None = None) -> torch.Tensor:
    from megatron.core import parallel_state as ranks

    with MegatronStreams(trainer.model).watch(given) as seen:
        trainer.log_probs(batch())
    groups = ranks.get_tensor_model_parallel_group(), ranks.get_model_parallel_group()
    return seen.gathered(*groups)[:6]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_what_is_packed_arrives(tokens: int, points: int, seed: int) -> None:
    sent = torch.randn(tokens, points, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    sent[0, 0, :3] = torch.tensor([torch.inf, -0.0, 1e-40])
    arrived = unpack(pack(sent))
    assert torch.equal(arrived.view(torch.int16), sent.view(torch.int16))


def test_an_observation_arrives_whole_or_not_at_all() -> None:
    routes = torch.tensor([[[1, 0]], [[2, 3]]])
    sent = StreamObservation(torch.randn(2, 2, 4).bfloat16(), torch.tensor([-1.0, -0.5]), routes)
    arrived = StreamObservation.from_json(sent.to_json())
    assert arrived.routes is not None and torch.equal(arrived.routes, routes)
    assert torch.equal(arrived.stream, sent.stream) and torch.equal(arrived.logprobs, sent.logprobs)
    with pytest.raises(StreamError, match="2 tokens and 1 log-probs"):
        StreamObservation.from_json(sent.to_json() | {"logprobs": [-1.0]})
    with pytest.raises(StreamError, match="16 bytes came for a BF16 tensor of shape"):
        unpack(pack(torch.zeros(2, 4).bfloat16()) | {"shape": [3, 4]})


@settings(deadline=None)
@example(values=[30.0], scale=0.3)  # 30 * 0.3 / 0.3 is not 30 in fp32
@given(
    st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20),
    st.sampled_from([1.0, 0.25, 2.0**-6, 0.3]),
)
def test_a_cache_gives_back_the_nearest_number_or_the_next_one_to_zero(
    values: list[float], scale: float
) -> None:
    x = torch.tensor(values) * scale
    nearest, cut = (through_cache(x, scale, truncates=way) for way in (False, True))
    scaled = (x / scale).clamp(-E4M3_MAX, E4M3_MAX)
    below = CODES[torch.searchsorted(CODES, scaled.abs(), right=True) - 1]
    assert torch.equal(cut.abs(), below * scale)
    assert bool((cut * x >= 0).all())
    error = (nearest / scale - scaled).abs()
    to_codes = (scaled.abs()[:, None] - CODES).abs().amin(1)
    fp32_noise = 2.0**-22 * scaled.abs()  # of the two divisions here
    assert bool(((error - to_codes).abs() <= fp32_noise).all())


@settings(deadline=None)
@given(
    st.lists(st.floats(-600, 600, width=16), min_size=1, max_size=20),
    st.sampled_from([1.0, 2.0**-6, 0.3, 0.0117]),
)
def test_a_cache_that_cuts_off_holds_the_nearest_of_what_was_rounded_before(
    values: list[float], scale: float
) -> None:
    from fp8rl.sync.engine_kv_round import to_nearest

    x = (torch.tensor(values) * scale).bfloat16()
    held = through_cache(to_nearest(x, scale).float(), scale, truncates=True)
    assert torch.equal(held, through_cache(x.float(), scale, truncates=False))


def test_layers_that_are_given_their_own_stream_give_it_again(trainer: MegatronTrainer) -> None:
    own = streams(trainer)
    assert own.shape == (6, 9, LAYERS + 1, 128)
    assert torch.equal(streams(trainer, own.bfloat16()), own), "in both micro-batches of 4 rows"
    assert torch.equal(streams(trainer), own), "no hook stays behind"


def test_a_layer_answers_for_the_stream_that_it_is_given_alone(trainer: MegatronTrainer) -> None:
    given = streams(trainer).bfloat16()
    before = streams(trainer, given)
    changed = given.clone()
    changed[:, :, 1] *= -1  # what layer 1 reads
    after = streams(trainer, changed)
    moved = (before != after).flatten(0, 1).any(-1).any(0)
    assert moved.tolist() == [False, False, True, False]


def test_a_rounded_cache_changes_every_layer_and_leaves_nothing_behind(
    trainer: MegatronTrainer,
) -> None:
    given = streams(trainer).bfloat16()
    plain = streams(trainer, given)
    scales = KVScales.from_amax(torch.full((LAYERS, 3), 8.0), version=0, tokens=1)
    with MegatronStreams(trainer.model).rounded_cache(scales, truncates=False):
        rounded = streams(trainer, given)
    moved = (plain != rounded).flatten(0, 1).any(-1).any(0)
    assert moved.tolist() == [False, True, True, True]
    added = plain[:, :, 1:] - given[:, :, :-1]
    relative = (plain - rounded).norm() / added.norm()
    assert 0 < relative < 0.5
    assert torch.equal(streams(trainer, given), plain)
