"""What the trainer's side refuses before the engine hears of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8rl.quant import (
    EngineTensor,
    KVScaleError,
    KVScales,
    NonFiniteWeightError,
    QuantPlan,
    quantize_blockwise,
)
from fp8rl.sync.errors import SourceError
from fp8rl.sync.fingerprint import fingerprint
from fp8rl.sync.manifest import DTYPES, align, parse_manifest
from fp8rl.sync.publisher import Publisher
from fp8rl.sync.shm import ShmInbox
from fp8rl.sync.source import IterableSource, WeightSource
from fp8rl.sync.staging import Staging
from fp8rl.sync.transport import ShmIntroduction, parse_introduction, parse_stage
from tests import helpers

PLAN = QuantPlan.from_hf_config(helpers.hf_config())
A_WEIGHT = "model.layers.1.mlp.down_proj.weight"
A_NORM = "model.layers.0.input_layernorm.weight"


TENSORS = [tensor.name for tensor in PLAN.engine_tensors()]
SCALES = list(helpers.scales(0).tensors())


class Recorder:
    """A client that keeps the calls, and takes in the payload as an engine would."""

    def __init__(self, plan: QuantPlan = PLAN) -> None:
        self.calls: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.manifest: Any = None
        self.manifests: list[Any] = []
        scales = [EngineTensor(name, torch.float32, (1,)) for name in SCALES]
        self.staging = Staging([*plan.engine_tensors(), *scales])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        introduction = parse_introduction(init_info["transport"])
        assert isinstance(introduction, ShmIntroduction)
        self.inbox = ShmInbox(introduction)

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        (kind,) = update_info.keys() - {"publisher"}
        self.calls.append(kind)
        if kind == "stage":
            self.staging.receive(parse_stage(update_info["stage"]), self.inbox)
        elif kind == "manifest":
            self.take(parse_manifest(update_info["manifest"]))

    def take(self, manifest: Any) -> None:
        self.manifest = manifest
        self.manifests.append(manifest)
        payload = self.staging.take(manifest.payload_nbytes)
        for record in manifest.tensors:
            raw = payload[record.parcel.offset :][: record.parcel.nbytes]
            assert fingerprint(raw) == record.digest
            self.tensors[record.name] = raw.view(DTYPES[record.dtype]).reshape(record.shape)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(f"finish {weight_version}")


def publish(
    tensors: dict[str, torch.Tensor], recorder: Recorder, *, version: int = 0, **options: Any
) -> Any:
    with Publisher(PLAN, recorder, kv_layers=helpers.LAYERS, **options) as publisher:
        source = IterableSource(tensors)
        return publisher.publish(source, version=version, kv_scales=helpers.scales(version))


def test_the_wire_carries_exactly_the_plans_tensors_and_the_scales() -> None:
    recorder, weights = Recorder(), helpers.weights(0)
    report = publish(weights, recorder, version=5)
    assert recorder.calls == ["start", "stage", "manifest", "finish 5"]
    scales = helpers.scales(5).tensors()
    expected = [tensor.name for tensor in PLAN.engine_tensors()] + list(scales)
    assert list(recorder.tensors) == expected
    quantized = quantize_blockwise(weights[A_WEIGHT])
    assert torch.equal(
        recorder.tensors[A_WEIGHT].view(torch.uint8), quantized.data.view(torch.uint8)
    )
    assert torch.equal(recorder.tensors[f"{A_WEIGHT}_scale_inv"], quantized.scale_inv)
    assert torch.equal(recorder.tensors[A_NORM], weights[A_NORM])
    assert all(torch.equal(recorder.tensors[name], value) for name, value in scales.items())
    assert recorder.manifest.kv_scales.version == 5
    assert recorder.manifest.kv_scales.observer == "amax"
    assert recorder.manifest.kv_scales.tokens == 100
    assert report.kv_scales == helpers.scales(5)
    assert report.tensors == len(expected)
    assert report.kind == "full" and report.failed == {}
    assert report.nbytes == sum(align(t.nbytes) for t in recorder.tensors.values())
    assert report.bf16_nbytes == sum(t.nbytes for t in weights.values())


@pytest.mark.parametrize("name", [A_WEIGHT, A_NORM, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_never_leaves_the_trainer(name: str, value: float) -> None:
    recorder, weights = Recorder(), helpers.weights(0)
    weights[name].view(-1)[3] = value
    with pytest.raises(NonFiniteWeightError, match=name):
        publish(weights, recorder)
    assert recorder.calls == []


def test_a_missing_tensor_is_named_before_the_engine_hears_of_it() -> None:
    recorder, weights = Recorder(), helpers.weights(0)
    del weights[A_NORM]
    with pytest.raises(SourceError, match=A_NORM):
        publish(weights, recorder)
    assert recorder.calls == []


def test_missing_kv_scales_are_named() -> None:
    recorder = Recorder()
    with (
        Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher,
        pytest.raises(SourceError, match=r"layers\.0\.self_attn\.attn\.q_scale") as refused,
    ):
        publisher.publish(helpers.source(0), version=0, kv_scales=None)
    scales = helpers.scales(0).tensors()
    assert f"version 0 lacks {len(scales)} tensors: {', '.join(scales)}" in str(refused.value)
    assert recorder.calls == []


def test_kv_scales_of_another_version_are_refused_before_the_engine_hears_of_it() -> None:
    recorder = Recorder()
    with (
        Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher,
        pytest.raises(KVScaleError, match=r"version 4 is published .* measured on version 3"),
    ):
        publisher.publish(helpers.source(0), version=4, kv_scales=helpers.scales(3))
    assert recorder.calls == []


@pytest.mark.parametrize("layers", [1, 3])
def test_kv_scales_of_another_number_of_layers_are_refused(layers: int) -> None:
    recorder, scales = Recorder(), helpers.scales(0)
    other = replace(scales, layers=(scales.layers * 2)[:layers])
    with (
        Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher,
        pytest.raises(SourceError, match=rf"layers\.{min(layers, 2)}\.self_attn\.attn\.q_scale"),
    ):
        publisher.publish(helpers.source(0), version=0, kv_scales=other)
    assert recorder.calls == []


def test_scales_measured_in_the_engine_follow_the_weights() -> None:
    recorder = Recorder()

    def measure() -> KVScales:
        recorder.calls.append("measure")
        time.sleep(0.02)
        return helpers.scales(2)

    with Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher:
        report = publisher.publish(helpers.source(0), version=2, kv_scales=measure)
    sent = ["stage", "manifest"]
    assert recorder.calls == ["start", *sent, "measure", *sent, "finish 2"]
    weights, scales = recorder.manifests
    assert weights.kv_scales == "follow" and scales.kv_scales.tokens == 100
    assert (weights.version, scales.version) == (2, 2)
    assert [r.name for r in weights.tensors] == [tensor.name for tensor in PLAN.engine_tensors()]
    sent = helpers.scales(2).tensors()
    assert [r.name for r in scales.tensors] == list(sent)
    assert all(torch.equal(recorder.tensors[name], value) for name, value in sent.items())
    assert report is not None and report.kv_scales == helpers.scales(2)
    assert report.tensors == len(recorder.tensors)
    assert report.kv_seconds >= 0.02


def test_scales_that_follow_are_checked_like_those_that_come_along() -> None:
    one_layer = replace(helpers.scales(2), layers=helpers.scales(2).layers[:1])
    for measured, error, named in (
        (helpers.scales(1), KVScaleError, "measured on version 1"),
        (one_layer, SourceError, r"lacks 3 tensors: model\.layers\.1\.self_attn\.attn\.q_scale"),
    ):
        recorder = Recorder()
        with (
            Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher,
            pytest.raises(error, match=named),
        ):
            publisher.publish(helpers.source(0), version=2, kv_scales=lambda m=measured: m)
        assert recorder.calls == ["start", "stage", "manifest", "abandon"]


def test_scales_for_an_engine_that_takes_none_are_refused() -> None:
    for kv_scales in (helpers.scales(0), lambda: helpers.scales(0)):
        recorder = Recorder()
        with (
            Publisher(PLAN, recorder) as publisher,
            pytest.raises(SourceError, match="was kv_layers set"),
        ):
            publisher.publish(helpers.source(0), version=0, kv_scales=kv_scales)
        assert recorder.calls == []


def test_a_tensor_of_another_model_shape_or_twice_is_refused() -> None:
    recorder, weights = Recorder(), helpers.weights(0)
    with pytest.raises(SourceError, match=r"the plan not, 1 tensor.*layers\.7\.mlp\.up_proj"):
        publish({**weights, "model.layers.7.mlp.up_proj.weight": weights[A_WEIGHT]}, recorder)
    with pytest.raises(SourceError, match=rf"{A_WEIGHT}: shape \[256, 256\], planned"):
        publish({**weights, A_WEIGHT: torch.ones(256, 256, dtype=torch.bfloat16)}, recorder)
    with pytest.raises(SourceError, match=r"shape \[128\], planned \[256\]"):
        publish({**weights, A_NORM: torch.ones(128, dtype=torch.bfloat16)}, recorder)
    twice = [*weights.items(), (A_NORM, weights[A_NORM])]

    class Twice(IterableSource):
        def __iter__(self) -> Any:
            yield from twice

    with (
        Publisher(PLAN, recorder, kv_layers=helpers.LAYERS) as publisher,
        pytest.raises(SourceError, match=f"{A_NORM}"),
    ):
        publisher.publish(Twice(weights), version=0, kv_scales=helpers.scales(0))
    assert recorder.calls == []


def test_fp32_weights_are_published_only_as_what_the_trainer_says_they_are() -> None:
    weights = {name: weight.float() for name, weight in helpers.weights(0).items()}
    weights[A_WEIGHT] = weights[A_WEIGHT] * (1 + 2**-10)  # not a bf16 number any more
    with pytest.raises(SourceError, match="fp32_as"):
        publish(weights, Recorder())
    wire = {}
    for fp32_as in ("master", "export"):
        recorder = Recorder()
        publish(weights, recorder, fp32_as=fp32_as)
        wire[fp32_as] = recorder.tensors[A_WEIGHT].view(torch.uint8)
        q = quantize_blockwise(weights[A_WEIGHT], fp32_as=fp32_as)
        assert torch.equal(wire[fp32_as], q.data.view(torch.uint8))
    assert not torch.equal(wire["master"], wire["export"])


def test_a_rank_without_a_client_only_iterates() -> None:
    seen = []

    class Counting(IterableSource):
        def __iter__(self) -> Any:
            for name, tensor in super().__iter__():
                seen.append(name)
                yield name, tensor

    with Publisher(PLAN, None, kv_layers=helpers.LAYERS) as publisher:
        source = Counting(helpers.weights(0))
        assert isinstance(source, WeightSource)
        assert publisher.publish(source, version=0, kv_scales=helpers.scales(0)) is None
    assert seen == [entry.name for entry in PLAN.entries]
