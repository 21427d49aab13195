"""MegatronQKV on one rank: any spec, padded or packed, and what it refuses; ranks: test_qkv_ranks.

The model is a real GPTModel; for packed sequences its core attention is one of our own, since
Megatron's local one takes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8rl.quant import KVObservation, KVObserver, KVScaleError, KVScales
from fp8rl.sync import MegatronQKV, QKVSource
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from tests.sync.qkv_models import (
    PackedAttention,
    causal,
    config,
    gpt_model,
    packed_params,
    sequences,
)

TOKENS, REAL = sequences()
LENGTHS = REAL.sum(1).tolist()


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with init_distributed(config()), cpu_stands_in():
        yield


@pytest.fixture(scope="module")
def model(world: None) -> Any:
    """Megatron's local spec."""
    return gpt_model(config()).eval()


@pytest.fixture(scope="module")
def packing(world: None) -> Any:
    """A spec of our own, with the same weights."""
    return gpt_model(config(), PackedAttention).eval()


@pytest.fixture
def source(model: Any) -> MegatronQKV:
    return MegatronQKV(model)


@torch.no_grad()
def padded(model: Any, tokens: Tensor = TOKENS) -> None:
    model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), causal(tokens.shape[1]))


@torch.no_grad()
def packed(model: Any, rooms: list[int] | None = None) -> None:
    rows = [TOKENS[row, :room] for row, room in enumerate(rooms or LENGTHS)]
    tokens = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    model(tokens, positions, None, packed_seq_params=packed_params(LENGTHS, rooms))


def observer(model: Any) -> KVObserver:
    in_use = KVScales.from_amax(torch.full((4, 3), 2.0), version=0, tokens=1)
    return KVObserver(MegatronQKV(model).shape, histogram=True, in_use=in_use)


def seen(model: Any, run: Any, mask: Tensor | None = None, *more: Any) -> KVObservation:
    seer = observer(model)
    with MegatronQKV(model).watch(seer) as watch:
        watch.token_mask = mask
        run(model, *more)
    return seer.observation()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_it_is_a_source_of_the_whole_models_shape(source: MegatronQKV) -> None:
    assert isinstance(source, QKVSource)
    assert vars(source.shape) == {"layers": 4, "q_heads": 4, "kv_heads": 2}


def test_what_is_seen_is_what_core_attention_is_given(model: Any) -> None:
    given: dict[int, list[Tensor]] = {}
    core = {layer.layer_number - 1: layer.self_attention.core_attention for layer in
            model.decoder.layers}  # fmt: skip
    spies = [
        one.register_forward_pre_hook(
            lambda module, args, number=number: given.update({number: list(args[:3])})
        )
        for number, one in core.items()
    ]
    found = seen(model, padded, REAL)
    for spy in spies:
        spy.remove()
    want = [[x.transpose(0, 1)[REAL].abs().max() for x in given[layer]] for layer in range(4)]
    assert torch.equal(found.amax(), torch.tensor(want))
    assert found.tokens == sum(LENGTHS)


def test_garbage_in_the_padding_changes_nothing(model: Any) -> None:
    clean = seen(model, padded, REAL)
    other = torch.where(REAL, TOKENS, 63 - TOKENS)
    assert seen(model, padded, REAL, other).to_json() == clean.to_json()
    assert seen(model, padded, None).tokens == TOKENS.numel()


def test_packed_sequences_show_what_padded_ones_do(packing: Any) -> None:
    want = seen(packing, padded, REAL)
    found = seen(packing, packed)
    assert found.tokens == want.tokens == sum(LENGTHS)
    assert torch.allclose(found.amax(), want.amax(), rtol=2**-6)


@pytest.mark.parametrize("rooms", [[12] * 8, [12, 8, 8, 4, 8, 12, 4, 12], LENGTHS])
def test_padding_inside_a_packed_row_is_never_observed(packing: Any, rooms: list[int]) -> None:
    found = seen(packing, packed, None, rooms)
    assert found.tokens == sum(LENGTHS)
    assert torch.allclose(found.amax(), seen(packing, packed).amax(), rtol=2**-6)


def test_a_mask_narrows_packed_sequences_further(packing: Any) -> None:
    """As with trainers that announce padding as real tokens."""
    first = torch.arange(sum(LENGTHS)) < LENGTHS[0]
    assert seen(packing, packed, first[None]).tokens == LENGTHS[0]


def test_arguments_may_be_keywords(source: MegatronQKV, model: Any) -> None:
    q, k, v = (torch.randn(3, 2, heads, 64).bfloat16() for heads in (4, 2, 2))
    attend = model.decoder.layers[2].self_attention.core_attention
    counts = []
    for call in (
        lambda: attend(q, k, v, causal(3)),
        lambda: attend(query=q, key=k, value=v, attention_mask=causal(3)),
    ):
        seer = KVObserver(source.shape)
        with source.watch(seer), torch.no_grad():
            call()
        counts.append(seer.observation().to_json())
    assert counts[0] == counts[1]
    assert counts[0]["tokens_seen"] == [[0] * 8, [0] * 8, [6] * 8, [0] * 8]


def test_chunks_and_wrappers_are_one_model(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    seer = observer(model)
    with MegatronQKV([Wrapper(Wrapper(model))]).watch(seer) as watch:
        watch.token_mask = REAL
        padded(model)
    assert seer.observation().to_json() == seen(model, padded, REAL).to_json()


def test_no_hook_is_left_behind_even_by_a_forward_that_fails(
    source: MegatronQKV, model: Any
) -> None:
    with source.watch(observer(model)):
        assert hooks(model) == 4
        padded(model)
    assert hooks(model) == 0
    with pytest.raises(IndexError), source.watch(observer(model)):
        padded(model, torch.full((1, 4), 64))
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (REAL[:7], r"torch.bool \[7, 12\]"),
        (REAL.T, r"torch.bool \[12, 8\]"),
        (REAL.long(), r"torch.int64 \[8, 12\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(model: Any, mask: Tensor, found: str) -> None:
    with pytest.raises(KVScaleError, match=rf"layer 0: token_mask is {found}, .* \[8, 12\] tokens"):
        seen(model, padded, mask)


def test_a_forward_that_keeps_gradients_is_refused(model: Any) -> None:
    with pytest.raises(KVScaleError, match=r"layer 0: this forward keeps gradients.*no_grad"):
        seen(model, padded.__wrapped__)


def test_a_forward_that_is_computed_again_is_refused_too(
    world: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's checkpointing runs layers without gradients first, and with them again."""
    from megatron.core import tensor_parallel

    recompute = {"recompute_granularity": "full", "recompute_method": "uniform"}
    model = gpt_model(config(), **recompute, recompute_num_layers=1).train()
    source, seer = MegatronQKV(model), observer(model)
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):  # of a device that is not there
        monkeypatch.setattr(tensor_parallel.random, name, lambda *args, **options: None)
    tokens = TOKENS[:2]
    with source.watch(seer):
        loss = model(tokens, torch.arange(12).expand_as(tokens), causal(12)).float().sum()
        with pytest.raises(KVScaleError, match="layer 3: this forward keeps gradients"):
            loss.backward()
    assert seer.observation().tokens == tokens.numel()


def test_models_without_k_and_v_to_see_are_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting, value, message in [
        ("multi_latent_attention", True, "multi-latent attention.*BF16 KV cache"),
        ("cuda_graph_impl", "local", "cuda_graph_impl is 'local'.*measure in the engine"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(model.config, setting, value)
            with pytest.raises(KVScaleError, match=message):
                MegatronQKV(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.layers[2], "self_attention", nn.Identity())
        with pytest.raises(KVScaleError, match="layer 2 has no core attention but Identity"):
            MegatronQKV(model)
