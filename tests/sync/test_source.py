"""Any export of named tensors is a source, and any source comes as a plan has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fp8rl.quant import NonFiniteWeightError, QuantizedTensor, QuantPlan, quantize_blockwise
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.errors import SourceError
from fp8rl.sync.source import (
    IterableSource,
    TensorMeta,
    WeightSource,
    encoded,
    hugging_face_name,
)
from tests.helpers import hf_config, weights
from tests.sync.sharded_model import gathered, wrong

PLAN = QuantPlan.from_hf_config(hf_config())
TIED = QuantPlan.from_hf_config(hf_config() | {"tie_word_embeddings": True})
WEIGHTS = weights(seed=5)
WANT = gathered(PLAN, WEIGHTS)
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


class HFWeightTuple(NamedTuple):
    """As Megatron-Bridge yields."""

    param_name: str
    weight: Tensor


def stream(tensors: dict[str, Tensor] = WEIGHTS) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items()


FORMS: dict[str, Any] = {
    "a mapping": WEIGHTS,
    "pairs": list(WEIGHTS.items()),
    "a generator function": stream,
    "a function that returns a mapping": lambda: WEIGHTS,
    "named tuples": lambda: (HFWeightTuple(*pair) for pair in WEIGHTS.items()),
    "veRL's pair, without adapters": lambda: (stream(), None),
    "wrappers' names": lambda: ((f"module.{name}", t) for name, t in WEIGHTS.items()),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_named_tensors_can_be_passed_over_again_and_again(form: str) -> None:
    source = IterableSource(FORMS[form])
    assert isinstance(source, WeightSource)
    for _ in range(2):
        assert source.metadata() == [
            TensorMeta(name, t.dtype, tuple(t.shape)) for name, t in WEIGHTS.items()
        ]
        assert wrong(dict(source), dict(WEIGHTS)) == []
        assert wrong(dict(encoded(source, PLAN, to=[0])), WANT) == []


def test_nothing_is_copied() -> None:
    assert all(tensor is WEIGHTS[name] for name, tensor in IterableSource(WEIGHTS))


def test_elsewhere_nothing_is_yielded() -> None:
    with pytest.raises(SourceError, match=r"to must be ranks of a group of 1, found \[1\]"):
        list(encoded(IterableSource(WEIGHTS), PLAN, to=[1]))


@pytest.mark.parametrize("once", [stream(), iter(WEIGHTS.items()), zip("ab", "cd", strict=True)])
def test_what_runs_once_is_refused_with_what_to_pass(once: Any) -> None:
    with pytest.raises(SourceError, match=r"runs once .* pass what makes it: .*\(lambda: bridge"):
        IterableSource(once)


def test_a_callable_that_returns_the_same_generator_is_found_out() -> None:
    same = stream()
    source = IterableSource(lambda: same)
    assert len(source.metadata()) == len(WEIGHTS)
    with pytest.raises(SourceError, match=r"yielded 0 of 25 tensors .*the same generator again"):
        list(source)


def test_metadata_of_a_callable_costs_one_pass_or_none() -> None:
    passes = []

    def export() -> Iterator[tuple[str, Tensor]]:
        passes.append(1)
        return stream()

    source = IterableSource(export)
    known = source.metadata()
    assert source.metadata() == known
    assert len(passes) == 1
    given = IterableSource(export, metadata=known)
    assert given.metadata() == known
    assert len(passes) == 1
    list(given)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: WEIGHTS[UP].float()}, f"yielded .*{UP}.*float32.* announced .*bfloat16"),
        ({UP: WEIGHTS[UP][:4]}, rf"yielded .*{UP}.*\(4, 256\).* announced .*\(512, 256\)"),
        ({"more": WEIGHTS[UP]}, "yielded .*'more'.* as number 25, and announced 25 tensors"),
        ({UP: None}, "yielded .*down_proj.* announced .*up_proj"),
    ],
)
def test_a_pass_that_differs_from_what_was_announced_is_an_error(
    change: dict[str, Any], message: str
) -> None:
    live = dict(WEIGHTS)
    source = IterableSource(lambda: stream(live))
    source.metadata()
    live |= change
    live = {name: tensor for name, tensor in live.items() if tensor is not None}
    with pytest.raises(SourceError, match=message):
        list(source)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: [("a", torch.ones(1)), ("module.a", torch.ones(1))], "yielded a twice"),
        (lambda: [("a", [1.0])], "a: expected a tensor, found list"),
        (lambda: 7, "expected pairs .*found int"),
        (lambda: (stream(), {"r": 8}), "LoRA adapters .* merge them"),
    ],
)
def test_what_is_no_stream_of_tensors_is_refused(tensors: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        list(IterableSource(tensors))


@pytest.mark.parametrize(
    "name",
    [
        "module.module.model.layers.3.mlp.up_proj.weight",
        "_orig_mod.model.layers.3.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.mlp.up_proj.weight",
        "module.model.layers.3._checkpoint_wrapped_module._orig_mod.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ],
)
def test_wrappers_prefixes_are_taken_off_names(name: str) -> None:
    assert hugging_face_name(name) == "model.layers.3.mlp.up_proj.weight"


def test_a_name_that_only_contains_module_is_left_alone() -> None:
    assert hugging_face_name("model.module.x") == "model.module.x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.rotary": WEIGHTS[NORM]}, "has, and the plan not, 1 .*rotary"),
        ({UP: None}, f"the source lacks 1 .*'{UP}'"),
        ({UP: WEIGHTS[UP].T.contiguous()}, rf"{UP}: shape \[256, 512\], planned \[512, 256\]"),
        ({UP: WEIGHTS[UP].float()}, f"{UP}: is fp32, and fp32_as is None"),
    ],
)
def test_a_source_that_does_not_fit_the_plan_is_refused_before_anything_is_yielded(
    change: dict[str, Any], message: str
) -> None:
    tensors = {n: t for n, t in (WEIGHTS | change).items() if t is not None}
    with pytest.raises(SourceError, match=message):
        next(encoded(IterableSource(tensors), PLAN, to=[0]))


def test_fp32_is_quantized_as_it_is_said_to_be_and_norms_go_in_the_plan_s_dtype() -> None:
    masters = {name: tensor.float() * 1.003 for name, tensor in WEIGHTS.items()}
    for fp32_as in ("master", "export"):
        want = gathered(PLAN, masters, fp32_as=fp32_as)
        got = dict(encoded(IterableSource(masters), PLAN, to=[0], fp32_as=fp32_as))  # type: ignore[arg-type]
        assert wrong(got, want) == []


def test_weights_get_the_scales_that_the_plan_says() -> None:
    plan = QuantPlan.from_hf_config(hf_config(), scale_format="fp32")
    want = gathered(plan, WEIGHTS, scale_format="fp32")
    assert wrong(dict(encoded(IterableSource(WEIGHTS), plan, to=[0])), want) == []
    assert wrong(dict(encoded(IterableSource(WEIGHTS), PLAN, to=[0])), want) != []
    held = quantize_blockwise(WEIGHTS[UP], scale_format="fp32")
    found = dict(encoded(IterableSource({**WEIGHTS, UP: held}), plan, to=[0]))[UP]  # type: ignore[dict-item]
    assert isinstance(found, QuantizedTensor) and found.scale_inv is held.scale_inv


@pytest.mark.parametrize("name", [UP, NORM])
def test_a_value_that_is_not_finite_is_named(name: str) -> None:
    bad = WEIGHTS[name].clone()
    bad.view(-1)[9] = torch.nan
    with pytest.raises(NonFiniteWeightError, match=rf"{name}: 1 non-finite .*9\] \(nan\)"):
        list(encoded(IterableSource(WEIGHTS | {name: bad}), PLAN, to=[0]))


def test_what_is_quantized_already_passes_as_it_is() -> None:
    q = quantize_blockwise(WEIGHTS[UP])
    source = IterableSource({**WEIGHTS, UP: q})  # type: ignore[dict-item]
    assert {m.name: m.dtype for m in source.metadata()}[UP] == FP8_DTYPE
    found = dict(encoded(source, PLAN, to=[0]))[UP]
    assert isinstance(found, QuantizedTensor)
    assert found.data is q.data and found.scale_inv is q.scale_inv


def test_other_scales_than_the_engine_s_are_refused() -> None:
    q = quantize_blockwise(WEIGHTS[UP], scale_format="fp32")
    with pytest.raises(SourceError, match=f"{UP}: .*'fp32', and the engine takes .*'pow2'"):
        list(encoded(IterableSource({**WEIGHTS, UP: q}), PLAN, to=[0]))  # type: ignore[dict-item]


def test_a_tied_head_is_left_out_where_it_is_the_embedding_and_an_error_where_not() -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = {**WEIGHTS, head: WEIGHTS[embedding].clone()}
    want = {name: q for name, q in WANT.items() if name != head}
    assert wrong(dict(encoded(IterableSource(tied), TIED, to=[0])), want) == []
    without = {name: t for name, t in WEIGHTS.items() if name != head}
    assert wrong(dict(encoded(IterableSource(without), TIED, to=[0])), want) == []
    with pytest.raises(SourceError, match=f"ties {head} to {embedding}.* two different tensors"):
        list(encoded(IterableSource(WEIGHTS), TIED, to=[0]))
