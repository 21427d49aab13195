"""HuggingFaceQKV: any attention implementation, padded or packed, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV3Config,
    DeepseekV3Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fp8rl.quant import KVObserver, KVScaleError
from fp8rl.sync import HuggingFaceQKV, QKVSource
from tests import helpers

RECORDED: dict[int, list[Tensor]] = {}
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 64, (4, 10), generator=GENERATOR)
LENGTHS = [10, 3, 7, 1]
REAL = torch.arange(10) < torch.tensor(LENGTHS)[:, None]
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}


def recording(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An attention implementation of one's own, which keeps what it was given."""
    RECORDED[module.layer_idx] = [x.transpose(1, 2) for x in (q, k, v)]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    model = Qwen3ForCausalLM(Qwen3Config(**helpers.hf_config())).bfloat16().eval()
    model.load_state_dict(helpers.weights(0))
    with torch.no_grad():
        yield model


@pytest.fixture(params=["sdpa", "eager", "recording"])
def implementation(model: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    model.set_attn_implementation(request.param)
    yield request.param
    model.set_attn_implementation("sdpa")


def seen(model: Any, mask: Tensor | None = None, tokens: Tensor = TOKENS, **given: Any) -> Any:
    """What was observed of one forward, and its logits."""
    source = HuggingFaceQKV(model)
    seer = KVObserver(source.shape, histogram=True)
    with source.watch(seer) as watch:
        watch.token_mask = mask
        logits = model(tokens, use_cache=False, **given).logits
    return seer.observation(), logits


def left_behind(model: nn.Module) -> int:
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    return hooks + ("get_interface" in vars(ALL_ATTENTION_FUNCTIONS))


def test_it_is_a_source_of_the_models_shape(model: Any) -> None:
    source = HuggingFaceQKV(model)
    assert isinstance(source, QKVSource)
    assert vars(source.shape) == {"layers": 2, "q_heads": 4, "kv_heads": 2}


def test_what_is_seen_is_what_the_implementation_is_given(model: Any, implementation: str) -> None:
    found, logits = seen(model, attention_mask=REAL.long())
    assert torch.equal(logits, model(TOKENS, attention_mask=REAL.long(), use_cache=False).logits)
    if implementation == "recording":
        want = [[x[REAL].abs().max() for x in RECORDED[layer]] for layer in range(2)]
        assert torch.equal(found.amax(), torch.tensor(want))
    assert found.tokens == sum(LENGTHS)
    assert left_behind(model) == 0


def test_implementations_show_the_same(model: Any) -> None:
    amax = {}
    for name in ("sdpa", "eager", "recording"):
        model.set_attn_implementation(name)
        amax[name] = seen(model, attention_mask=REAL.long())[0].amax()
    model.set_attn_implementation("sdpa")
    assert torch.equal(amax["recording"], amax["sdpa"])
    assert torch.allclose(amax["eager"], amax["sdpa"], rtol=2**-6)


@pytest.mark.parametrize("real", [REAL, REAL.flip(1)], ids=["right", "left"])
def test_garbage_in_the_padding_changes_nothing(model: Any, real: Tensor) -> None:
    garbage = torch.where(real, TOKENS, 63 - TOKENS)
    found, _ = seen(model, attention_mask=real.long())
    assert found.tokens == sum(LENGTHS)
    assert seen(model, tokens=garbage, attention_mask=real.long())[0].to_json() == found.to_json()
    assert seen(model)[0].tokens == TOKENS.numel()


def test_a_token_mask_goes_before_the_attention_mask(model: Any) -> None:
    narrow = REAL & (torch.arange(10) < 2)
    assert seen(model, narrow, attention_mask=REAL.long())[0].tokens == int(narrow.sum())


def test_the_mask_is_found_wherever_it_is_given(model: Any) -> None:
    source = HuggingFaceQKV(model)
    counts = []
    for call in (
        lambda: model(TOKENS, REAL.long()),
        lambda: model.model(TOKENS, attention_mask=REAL),  # as fused losses call it
        lambda: model(inputs_embeds=model.get_input_embeddings()(TOKENS), attention_mask=REAL),
    ):
        seer = KVObserver(source.shape)
        with source.watch(seer):
            call()
        counts.append(seer.observation().tokens)
    assert counts == [sum(LENGTHS)] * 3


def test_packed_sequences_show_what_padded_ones_do(model: Any) -> None:
    want, _ = seen(model, attention_mask=REAL.long())
    rows = torch.cat([row[:length] for row, length in zip(TOKENS, LENGTHS, strict=True)])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found, _ = seen(model, tokens=rows, position_ids=positions)
    assert found.tokens == want.tokens
    assert torch.allclose(found.amax(), want.amax(), rtol=2**-6)


@pytest.mark.parametrize(
    "other",
    [
        LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=1)),
        GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=64)),
    ],
    ids=["llama, one key head", "gpt2"],
)
def test_other_architectures_are_seen_too(other: Any) -> None:
    with torch.no_grad():
        found, _ = seen(other, attention_mask=REAL.long())
    assert found.shape.kv_heads == (1 if "Llama" in type(other).__name__ else 4)
    assert (found.shape.layers, found.tokens) == (3, sum(LENGTHS))
    assert bool((found.amax() > 0).all())


def test_other_models_only_pass_through(model: Any) -> None:
    other = Qwen3ForCausalLM(Qwen3Config(**helpers.hf_config())).bfloat16().eval()
    source, inner = HuggingFaceQKV(model), HuggingFaceQKV(other)
    seers = KVObserver(source.shape), KVObserver(inner.shape)
    with source.watch(seers[0]):
        other(TOKENS)
        with inner.watch(seers[1]):
            model(TOKENS)
            other(TOKENS[:1])
        other(TOKENS)
        model(TOKENS)
    assert [seer.observation().tokens for seer in seers] == [2 * TOKENS.numel(), 10]
    assert left_behind(model) == left_behind(other) == 0


def test_nothing_is_left_behind_by_a_forward_that_fails(model: Any) -> None:
    with pytest.raises(IndexError):
        seen(model, tokens=torch.full((1, 4), 64))
    assert left_behind(model) == 0


def test_nothing_is_seen_while_the_watch_is_paused(model: Any) -> None:
    source = HuggingFaceQKV(model)
    observer = KVObserver(source.shape)
    with source.watch(observer) as watch:
        for watch.paused in (True, False, True):
            model(TOKENS, use_cache=False)
    assert observer.observation().tokens == TOKENS.numel()


def test_a_forward_that_reads_a_cache_is_refused(model: Any) -> None:
    source = HuggingFaceQKV(model)
    seer = KVObserver(source.shape)
    with (
        pytest.raises(KVScaleError, match=r"layer 0: 1 queries meet 5 keys.*use_cache=False"),
        source.watch(seer),
    ):
        model.generate(TOKENS[:1, :4], max_new_tokens=3, do_sample=False)
    assert seer.observation().tokens == 4  # the prompt, which filled the cache


def test_a_forward_that_keeps_gradients_is_refused(model: Any) -> None:
    with torch.enable_grad(), pytest.raises(KVScaleError, match=r"layer 0: .*gradients"):
        seen(model)


def test_masks_that_do_not_tell_real_tokens_are_refused(model: Any) -> None:
    square = torch.ones(4, 1, 10, 10, dtype=torch.bool).tril()
    with pytest.raises(KVScaleError, match=r"attention_mask is a Tensor \[4, 1, 10, 10\].*token_"):
        seen(model, attention_mask=square)
    assert seen(model, REAL, attention_mask=square)[0].tokens == sum(LENGTHS)
    with pytest.raises(KVScaleError, match="attention_mask is a dict"):
        seen(model, attention_mask={"full_attention": None})
    with pytest.raises(KVScaleError, match=r"token_mask is torch.bool \[3, 10\].*\[4, 10\] tokens"):
        seen(model, REAL[:3])


def test_models_without_k_and_v_to_see_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(KVScaleError, match="no layer of MambaForCausalLM calls"):
        HuggingFaceQKV(mamba)
    with torch.device("meta"):
        latent = DeepseekV3Model(DeepseekV3Config(num_hidden_layers=1, vocab_size=64))
    with pytest.raises(KVScaleError, match="multi-latent attention"):
        HuggingFaceQKV(latent)
