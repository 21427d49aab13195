"""What a rank says that it holds: refused where it is not sure, cheap where it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8rl.quant import QuantPlan, QuantPlanError, fake_quantize
from fp8rl.sync import MegatronSource, SourceError, load_hf_checkpoint, shard_pass
from tests.sync.allocations import Allocations
from tests.sync.megatron_models import (
    CONFIGS,
    alone,
    checkpoint,
    gpt_chunks,
)
from tests.sync.megatron_settings import LAYERS, Layout

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with alone():
        yield


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral's names for Qwen3-MoE": ("qwen3-moe", CONFIGS["mixtral"], "q_layernorm.*q_norm"),
    "Qwen3-MoE's for Mixtral": ("mixtral", CONFIGS["qwen3-moe"], "linear_fc1.* is .*, which is no"),
    "Llama's for Qwen2's biases": (
        "qwen2",
        CONFIGS["llama"] | {"tie_word_embeddings": True},
        "linear_qkv.bias' carries .*q_proj.bias",
    ),
    "fewer layers": (
        "llama",
        CONFIGS["llama"] | {"num_hidden_layers": 3},
        r"layers\.3\..* carries",
    ),
    "more layers": ("llama", CONFIGS["llama"] | {"num_hidden_layers": 5}, r"layers\.4\..*none of"),
    "fewer experts": ("mixtral", CONFIGS["mixtral"] | {"num_local_experts": 3}, "router.weight"),
    "more words": ("llama", CONFIGS["llama"] | {"vocab_size": 129}, "word_embeddings.* no part of"),
    "other heads": (
        "llama",
        CONFIGS["llama"] | {"num_attention_heads": 8},
        "num_attention_heads=8",
    ),
    "a head": ("qwen2", CONFIGS["qwen2"] | {"tie_word_embeddings": False}, "tie_word_embeddings="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_config_of_another_model_is_refused(case: str) -> None:
    family, config, message = REFUSED[case]
    with pytest.raises(SourceError, match=message):
        MegatronSource(gpt_chunks(CONFIGS[family]), config)


def test_an_architecture_that_no_plan_knows_is_refused() -> None:
    with pytest.raises(QuantPlanError, match="'GptOssForCausalLM' is not known"):
        MegatronSource(
            gpt_chunks(CONFIGS["llama"]),
            CONFIGS["llama"] | {"architectures": ["GptOssForCausalLM"]},
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mtp_num_layers", 1),
        ("rotary_interleaved", True),
        ("layernorm_zero_centered_gamma", True),
        ("attention_output_gate", True),
    ],
)
def test_settings_that_give_parameters_another_meaning_are_refused(
    setting: str, value: object
) -> None:
    chunks = gpt_chunks(CONFIGS["llama"])
    setattr(chunks[0].config, setting, value)
    with pytest.raises(SourceError, match=f"{setting}={value}"):
        MegatronSource(chunks, CONFIGS["llama"])


def test_an_expert_bias_that_the_family_does_not_have_is_refused() -> None:
    chunks = gpt_chunks(
        CONFIGS["qwen3-moe"],
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
    )
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.router\.expert_bias' .* has no Hugg"):
        MegatronSource(chunks, CONFIGS["qwen3-moe"])


@pytest.mark.parametrize("experts", ["sequential", "grouped", "stacked"])
def test_a_part_is_a_view_but_for_q_k_and_v_one_at_a_time(experts: str) -> None:
    family = "qwen3-moe"
    (model,) = gpt_chunks(CONFIGS[family], Layout(experts=experts))
    source = MegatronSource(model, CONFIGS[family])
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for shard in source._held.shards.values():
        with Allocations(model.parameters()) as seen:
            part = shard.read()
        assert isinstance(part, Tensor)
        if part.untyped_storage().data_ptr() in storages:
            assert seen.peak == 0
        else:
            assert shard.name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
            assert seen.peak == part.nbytes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pass_needs_no_more_than_a_layer_on_top_of_the_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[family]
    (model,) = gpt_chunks(config)
    source = MegatronSource(model, config)
    layer = sum(p.nbytes for p in model.decoder.layers[0].parameters())
    assert layer < sum(p.nbytes for p in model.parameters()) / (LAYERS - 1)
    monkeypatch.setattr(shard_pass, "BUCKET_BYTES", layer)
    with Allocations(model.parameters()) as seen:
        for _ in source:
            pass
    assert 0 < seen.peak <= layer
    with Allocations(model.parameters()) as seen:
        for _ in source.encoded(QuantPlan.from_hf_config(config), to=[0]):
            pass
    assert 0 < seen.peak <= layer


def test_linears_are_the_rows_of_their_tensors() -> None:
    config = CONFIGS["llama"]
    chunks = gpt_chunks(config)
    given = checkpoint(config)
    load_hf_checkpoint(chunks, config, given)
    linears = MegatronSource(chunks, config).linears()
    found = {name: one.module.weight[rows] for one in linears for name, rows in one.rows.items()}
    assert found.keys() == {n for n, t in given.items() if ".layers." in n and t.ndim == 2}
    assert all(torch.equal(tensor, given[name]) for name, tensor in found.items())


def test_experts_one_by_one_can_be_fake_quantized_and_those_in_one_module_cannot() -> None:
    config = CONFIGS["mixtral"]
    plan = QuantPlan.from_hf_config(config)
    linears = MegatronSource(gpt_chunks(config), config).linears()
    handle = fake_quantize(linears, plan, activations=None)
    assert set(handle.names) == {entry.name for entry in plan.entries if entry.quantized}
    handle.remove()
    for experts in ("grouped", "stacked"):
        source = MegatronSource(gpt_chunks(config, Layout(experts=experts)), config)
        with pytest.raises(SourceError, match=r"mlp\.experts\.\S+' is one of several experts'"):
            source.linears()
