"""MegatronSource of the reference trainer on one rank, and what it refuses.

Other families: test_megatron_families.py; over ranks: test_megatron_ranks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fp8rl.batch import TokenBatch
from fp8rl.config.file import parse_config
from fp8rl.quant import QuantPlan
from fp8rl.sync.errors import SourceError
from fp8rl.sync.megatron import MegatronSource
from fp8rl.sync.megatron_layout import global_parameters
from fp8rl.sync.source import WeightSource
from fp8rl.trainer.distributed import init_distributed
from fp8rl.trainer.megatron import MegatronTrainer
from fp8rl.trainer.megatron_model import hf_config

SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_heads": 8}
QKV_PARAMETERS = {"qwen3": ("weight",), "qwen2": ("weight", "bias")}
VOCAB = 64


@pytest.fixture(scope="module", params=QKV_PARAMETERS)
def trainer(request: pytest.FixtureRequest) -> Iterator[MegatronTrainer]:
    shape = SHAPE | ({"hidden_size": 512} if request.param == "qwen2" else {})
    config = parse_config({"model": {"family": request.param, **shape}})
    with init_distributed(config):
        yield MegatronTrainer(config, VOCAB)


@pytest.fixture
def config_json(trainer: MegatronTrainer) -> dict[str, Any]:
    return hf_config(trainer._config.model, VOCAB, 64)


@pytest.fixture
def source(trainer: MegatronTrainer) -> MegatronSource:
    return trainer.source()


def test_names_shapes_and_dtype_are_those_of_hugging_face(
    source: MegatronSource, config_json: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_json))
    assert [type(model).__name__] == config_json["architectures"]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {meta.name: meta.shape for meta in source.metadata()}
    assert found == expected and list(found) == list(expected)
    assert {meta.dtype for meta in source.metadata()} == {torch.bfloat16}


def test_the_quantization_plan_knows_every_tensor(
    source: MegatronSource, config_json: dict[str, Any]
) -> None:
    plan = QuantPlan.from_hf_config(config_json)
    announced = {meta.name: meta.shape for meta in source.metadata()}
    assert {entry.name: tuple(entry.shape) for entry in plan.entries} == announced


def test_iteration_keeps_what_metadata_says_on_every_pass(source: MegatronSource) -> None:
    assert isinstance(source, WeightSource)
    for _ in range(2):
        found = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]
        assert found == [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()]


def test_query_groups_are_taken_apart_in_order(
    source: MegatronSource, trainer: MegatronTrainer
) -> None:
    tokens = torch.randint(0, VOCAB, (4, 8))
    batch = TokenBatch(tokens, (torch.arange(8) > 3).expand(4, 8))
    trainer.update(batch, lambda log_probs, rows: -log_probs.sum())  # biases begin at zero
    parameters, weights = global_parameters(trainer._model), dict(source)
    for kind in QKV_PARAMETERS[trainer._config.model.family]:
        qkv = parameters[f"decoder.layers.1.self_attention.linear_qkv.{kind}"].detach()
        q, k, v = (weights[f"model.layers.1.self_attn.{x}_proj.{kind}"].split(64) for x in "qkv")
        expected = torch.cat([*q[:4], k[0], v[0], *q[4:], k[1], v[1]])
        assert torch.equal(qkv, expected) and qkv.count_nonzero() > 0.9 * qkv.numel()


def test_tensors_are_views_where_layouts_agree(
    source: MegatronSource, trainer: MegatronTrainer
) -> None:
    storages = {p.untyped_storage().data_ptr() for p in trainer._model.parameters()}
    copied = {n for n, tensor in source if tensor.untyped_storage().data_ptr() not in storages}
    assert all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in copied)
    assert all(not tensor.requires_grad for _, tensor in source)


def test_a_new_pass_sees_the_newest_weights(
    source: MegatronSource, trainer: MegatronTrainer
) -> None:
    before = {name: tensor.clone() for name, tensor in source}
    tokens = torch.randint(0, VOCAB, (4, 8))
    batch = TokenBatch(tokens, (torch.arange(8) > 3).expand(4, 8))
    trainer.update(batch, lambda log_probs, rows: -log_probs.sum(), learning_rate=0.1)
    assert all(not torch.equal(before[name], tensor) for name, tensor in source)


def test_an_unknown_parameter_is_named(
    trainer: MegatronTrainer, config_json: dict[str, Any]
) -> None:
    mlp = trainer._model.decoder.layers[1].mlp
    mlp.register_parameter("surprise", torch.nn.Parameter(torch.zeros(3).bfloat16()))
    try:
        with pytest.raises(SourceError, match=r"decoder\.layers\.1\.mlp\.surprise"):
            MegatronSource(trainer._model, config_json)
    finally:
        del mlp.surprise


def test_a_tensor_that_nobody_holds_is_named(
    trainer: MegatronTrainer, config_json: dict[str, Any]
) -> None:
    norm = trainer._model.decoder.final_layernorm
    weight = norm.weight
    norm.weight = None
    try:
        with pytest.raises(SourceError, match=r"model\.norm\.weight: .*none of them holds"):
            MegatronSource(trainer._model, config_json)
    finally:
        norm.weight = weight


def test_a_parameter_of_another_dtype_is_named(
    trainer: MegatronTrainer, config_json: dict[str, Any]
) -> None:
    norm = trainer._model.decoder.final_layernorm
    weight = norm.weight
    norm.weight = torch.nn.Parameter(weight.detach().float())
    try:
        with pytest.raises(SourceError, match=r"final_layernorm\.weight.*float32"):
            MegatronSource(trainer._model, config_json)
    finally:
        norm.weight = weight
