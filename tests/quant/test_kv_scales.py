"""KV scales: powers of two rounded up, complete, with their origin, exact through JSON."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.quant import KVScaleError, KVScales

from .oracle import pow2_scale_inv
from .refusal import refusal

AMAX = torch.tensor([[448.0, 3.0, 0.1], [449.0, 896.0, 1e-3]])


def scales(amax: torch.Tensor = AMAX, **options) -> KVScales:
    return KVScales.from_amax(amax, **{"version": 7, "tokens": 12} | options)


def test_a_scale_is_the_next_power_of_two_above_amax_over_448():
    first, second = scales().layers
    assert (first.q.scale, first.k.scale, first.v.scale) == (1.0, 2.0**-7, 2.0**-12)
    assert (second.q.scale, second.k.scale, second.v.scale) == (2.0, 2.0, 2.0**-18)
    assert (first.q.magnitude, first.k.magnitude) == (448.0, 3.0)
    assert first.v.magnitude == float(np.float32(0.1))
    assert torch.equal(scales().scales()[0], torch.tensor([1.0, 2.0**-7, 2.0**-12]))


positive = st.floats(2.0**-149, 2.0**127, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(positive, positive, positive), min_size=1, max_size=4))
def test_scales_are_the_definitions_for_any_amax(rows):
    found = KVScales.from_amax(torch.tensor(rows), version=0, tokens=1)
    for row, layer in zip(rows, found.layers, strict=True):
        assert [layer.q.magnitude, layer.k.magnitude, layer.v.magnitude] == list(row)
        assert [layer.q.scale, layer.k.scale, layer.v.scale] == [pow2_scale_inv(x) for x in row]


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.floats(2.0**-110, 2.0**127, width=32)] * 3))
def test_an_fp32_scale_is_the_smallest_that_covers_amax(row):
    found = KVScales.from_amax(torch.tensor([row]), version=0, tokens=1, scale_format="fp32")
    for amax, scale in zip(row, found.scales()[0].tolist(), strict=True):
        assert scale * 448 >= amax  # float64: exact
        assert float(np.nextafter(np.float32(scale), np.float32(0))) * 448 < amax


def test_margin_is_headroom_on_amax():
    assert scales(margin=1.0).layers[0].q.scale == 1.0
    assert scales(margin=1.01).layers[0].q.scale == 2.0
    assert scales(margin=1.01).layers[0].q.magnitude == 448.0
    assert scales(margin=0.5).layers[0].q.scale == 0.5


def test_the_magnitudes_of_heads_are_kept_as_data():
    heads = [[(1.0, 448.0), (3.0,), (0.1,)], [(449.0, 2.0), (896.0,), (1e-3,)]]
    kept = scales(head_amax=heads)
    assert kept.layers[1].q.head_amax == (449.0, 2.0)
    assert kept.layers[1].q.scale == scales().layers[1].q.scale
    assert KVScales.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_tensors_have_the_names_and_form_that_the_engine_loads():
    found = scales().tensors()
    assert list(found) == [
        f"model.layers.{i}.self_attn.attn.{x}_scale" for i in range(2) for x in "qkv"
    ]
    assert all(t.dtype == torch.float32 and t.shape == (1,) for t in found.values())
    assert found["model.layers.1.self_attn.attn.v_scale"].item() == 2.0**-18
    assert all(torch.equal(t.bfloat16().float(), t) for t in found.values())


def test_provenance_is_kept():
    found = scales(margin=1.25, observer="amax")
    assert (found.version, found.observer, found.tokens, found.margin) == (7, "amax", 12, 1.25)


@settings(max_examples=100, deadline=None)
@given(st.tuples(positive, positive, positive), st.floats(1, 2), st.integers(0, 2**40))
def test_json_gives_back_an_equal_object(row, margin, version):
    amax = torch.tensor([row]) / 2
    written = KVScales.from_amax(amax.clamp(min=1e-45), version=version, tokens=3, margin=margin)
    assert KVScales.from_json(json.loads(json.dumps(written.to_json()))) == written


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("layer", "column", "name"), [(0, 0, "q"), (1, 1, "k"), (1, 2, "v")])
def test_an_unusable_amax_names_layer_and_tensor(bad, layer, column, name):
    amax = AMAX.clone()
    amax[layer, column] = bad
    with pytest.raises(KVScaleError, match=f"layer {layer}, {name}: amax is {bad}"):
        scales(amax)


def test_an_amax_that_overflows_with_its_margin_is_refused():
    with pytest.raises(KVScaleError, match=r"layer 0, k: .*times margin 2\.0"):
        scales(torch.tensor([[1.0, 3e38, 1.0]]), margin=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": -1}, "version must be an integer >= 0, found -1"),
        ({"tokens": 0}, "tokens must be an integer >= 1, found 0"),
        ({"margin": 0.0}, "margin"),
        ({"margin": math.nan}, "margin"),
        ({"observer": ""}, "observer must be a name"),
        ({"amax": torch.zeros(0, 3)}, "at least one layer"),
        ({"amax": AMAX[None]}, r"must be float32 \[layers, 3\]"),
        ({"amax": AMAX.double()}, r"must be float32 \[layers, 3\]"),
    ],
)
def test_scales_without_a_sound_origin_are_refused(options, message):
    amax = options.pop("amax", AMAX)
    with refusal(KVScaleError, message) as found:
        scales(amax, **options)
    assert str(found.value)


def changed(layer: dict, x: str, **fields) -> dict:
    return {x: layer[x] | fields}


def test_json_that_is_not_complete_is_refused():
    good = scales().to_json()
    layer = good["layers"][0]
    without_k = {key: value for key, value in layer.items() if key != "k"}
    for bad, message in [
        ({k: v for k, v in good.items() if k != "version"}, "must have the fields"),
        (good | {"extra": 1}, "extra"),
        (good | {"layers": [without_k]}, "layer 0 must have the fields"),
        (good | {"layers": []}, "at least one layer"),
        (good | {"layers": {}}, "layers must be a list"),
        (good | {"layers": [layer | changed(layer, "k", scale=0.0)]}, "0, k: scale must be a fin"),
        (good | {"layers": [layer | changed(layer, "v", magnitude=math.nan)]}, "0, v: magnitude"),
        (good | {"layers": [layer | changed(layer, "q", head_amax=[math.inf])]}, "0, q: head_amax"),
        (good | {"layers": [layer | changed(layer, "q", head_amax=1.0)]}, "q: head_amax must be a"),
        (good | {"layers": [layer | {"q": {"scale": 1.0}}]}, "layer 0, q must have the fields"),
    ]:
        with pytest.raises(KVScaleError, match=message):
            KVScales.from_json(bad)
