"""A manifest comes in only if it names exactly what the engine takes, of one newer version."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.quant import EngineTensor, KVScaleError, QuantPlan
from fp8rl.sync.admission import admit_scales, admit_weights, copy_verified
from fp8rl.sync.errors import CorruptTensorError, ManifestError
from fp8rl.sync.manifest import (
    DTYPE_NAMES,
    KVProvenance,
    Manifest,
    TensorRecord,
    align,
    digest,
)
from fp8rl.sync.segment import Segment
from tests import helpers

SCALES = list(helpers.scales(0).tensors())
WEIGHTS = QuantPlan.from_hf_config(helpers.hf_config()).engine_tensors()[:4]
EXPECTED = {t.name: t for t in [*WEIGHTS, *(EngineTensor(n, torch.float32, (1,)) for n in SCALES)]}
ONLY_WEIGHTS = {t.name: t for t in WEIGHTS}
VERSION = 7
MEASURED = KVProvenance(version=VERSION, observer="amax", tokens=10)


def manifest(names: Any, kv_scales: Any = MEASURED, version: int = VERSION) -> Manifest:
    """One that names those tensors, as the engine takes them."""
    records, end = [], 0
    for name in names:
        _, dtype, shape = EXPECTED.get(name, EngineTensor(name, torch.float32, (1,)))
        nbytes = math.prod(shape) * dtype.itemsize
        records.append(record(name, dtype, shape, end, nbytes))
        end = align(end + nbytes)
    return Manifest(version=version, tensors=tuple(records), kv_scales=kv_scales)


def record(name: str, dtype: Any, shape: Any, offset: int, nbytes: int) -> TensorRecord:
    return TensorRecord(
        name=name,
        dtype=DTYPE_NAMES[dtype],
        shape=shape,
        offset=offset,
        nbytes=nbytes,
        digest="0" * 64,
    )


def test_weights_with_their_scales_come_in_and_so_do_weights_whose_scales_follow() -> None:
    assert admit_weights(manifest(EXPECTED), EXPECTED, committed=None) is None
    assert admit_weights(manifest(EXPECTED), EXPECTED, committed=VERSION - 1) is None
    assert admit_weights(manifest(ONLY_WEIGHTS, "follow"), EXPECTED, committed=None) is None
    assert admit_scales(manifest(SCALES), EXPECTED, awaited=VERSION) is None
    assert admit_weights(manifest(ONLY_WEIGHTS, None), ONLY_WEIGHTS, committed=None) is None


@given(sent=st.sets(st.sampled_from(list(EXPECTED)), min_size=1))
def test_whatever_is_not_sent_is_missing_by_name(sent: set[str]) -> None:
    missing = [name for name in EXPECTED if name not in sent]
    if not missing:
        return
    alone = sent <= set(SCALES)
    with pytest.raises(ManifestError, match="came alone" if alone else re.escape(missing[0])):
        admit_weights(manifest(sent), EXPECTED, committed=None)


@given(sent=st.sets(st.sampled_from(SCALES), min_size=1, max_size=len(SCALES) - 1))
def test_scales_that_follow_must_be_all_of_them(sent: set[str]) -> None:
    missing = [name for name in SCALES if name not in sent]
    with pytest.raises(ManifestError, match=rf"{len(missing)} missing: {re.escape(missing[0])}"):
        admit_scales(manifest(sent), EXPECTED, awaited=VERSION)


OTHER_LAYER = "model.layers.9.self_attn.attn.k_scale"
OLD = KVProvenance(version=VERSION - 1, observer="amax", tokens=10)
CASES: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "an older version": (
        lambda: admit_weights(manifest(EXPECTED), EXPECTED, committed=VERSION),
        ManifestError,
        f"version {VERSION} is not newer than {VERSION}",
    ),
    "scales alone": (
        lambda: admit_weights(manifest(SCALES), EXPECTED, committed=None),
        ManifestError,
        "no weights of that version were applied",
    ),
    "scales of a layer that the engine has not": (
        lambda: admit_weights(manifest([*EXPECTED, OTHER_LAYER]), EXPECTED, committed=None),
        ManifestError,
        f"1 not of this model: {OTHER_LAYER}",
    ),
    "scales of a layer that the engine has not, following": (
        lambda: admit_scales(manifest([*SCALES, OTHER_LAYER]), EXPECTED, awaited=VERSION),
        ManifestError,
        f"1 not of this model: {OTHER_LAYER}",
    ),
    "scales along although they are to follow": (
        lambda: admit_weights(manifest(EXPECTED, "follow"), EXPECTED, committed=None),
        ManifestError,
        f"{len(SCALES)} not of this model: {SCALES[0]}",
    ),
    "scales to follow for a BF16 cache": (
        lambda: admit_weights(manifest(ONLY_WEIGHTS, "follow"), ONLY_WEIGHTS, committed=None),
        KVScaleError,
        "this engine's KV cache is not FP8",
    ),
    "scales for a BF16 cache": (
        lambda: admit_weights(manifest(EXPECTED), ONLY_WEIGHTS, committed=None),
        ManifestError,
        f"{len(SCALES)} not of this model: {SCALES[0]}",
    ),
    "no provenance": (
        lambda: admit_weights(manifest(EXPECTED, None), EXPECTED, committed=None),
        KVScaleError,
        "no provenance",
    ),
    "no provenance of scales that follow": (
        lambda: admit_scales(manifest(SCALES, "follow"), EXPECTED, awaited=VERSION),
        KVScaleError,
        "no provenance",
    ),
    "measured on other weights": (
        lambda: admit_weights(manifest(EXPECTED, OLD), EXPECTED, committed=None),
        KVScaleError,
        f"measured on version {VERSION - 1}, the weights are version {VERSION}",
    ),
    "measured on other weights, following": (
        lambda: admit_scales(manifest(SCALES, OLD), EXPECTED, awaited=VERSION),
        KVScaleError,
        f"measured on version {VERSION - 1}, the weights are version {VERSION}",
    ),
    "scales of another version follow": (
        lambda: admit_scales(manifest(SCALES, version=VERSION + 1), EXPECTED, awaited=VERSION),
        ManifestError,
        f"KV scales of version {VERSION} are to follow, found a manifest of version {VERSION + 1}",
    ),
    "weights come where scales are to follow": (
        lambda: admit_scales(manifest(EXPECTED), EXPECTED, awaited=VERSION),
        ManifestError,
        f"{len(WEIGHTS)} not of this model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    admit, error, named = CASES[case]
    with pytest.raises(error, match=re.escape(named)):
        admit()


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(4096)
    yield made
    made.close()


def written(segment: Segment, value: float) -> Manifest:
    """A manifest of one scale, whose bytes lie in the segment."""
    tensor = torch.tensor([value], dtype=torch.float32)
    segment.view(0, 4).copy_(tensor.view(torch.uint8))
    found = record(SCALES[0], torch.float32, (1,), 0, 4)
    sent = found.model_copy(update={"digest": digest(tensor)})
    return Manifest(version=VERSION, tensors=(sent,), kv_scales=MEASURED)


@given(value=st.floats(min_value=2.0**-126, max_value=2.0**100, width=32))
def test_any_positive_scale_comes_in_as_it_is(value: float) -> None:
    with_one = Segment.create(64)
    assert float(copy_verified(written(with_one, value), with_one)[SCALES[0]]) == value
    with_one.close()


def test_a_measured_scale_of_one_is_a_scale(segment: Segment) -> None:
    assert float(copy_verified(written(segment, 1.0), segment)[SCALES[0]]) == 1.0


@pytest.mark.parametrize("value", [0.0, -0.0, -0.5])
def test_a_scale_that_is_not_above_zero_is_refused(segment: Segment, value: float) -> None:
    with pytest.raises(KVScaleError, match=re.escape(f"{SCALES[0]}: is {value}, must be above 0")):
        copy_verified(written(segment, value), segment)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_refused(segment: Segment, value: float) -> None:
    with pytest.raises(CorruptTensorError, match=re.escape(f"{SCALES[0]}: holds NaN or Inf")):
        copy_verified(written(segment, value), segment)


def test_a_changed_byte_is_refused_and_a_copy_is_independent_of_the_segment(
    segment: Segment,
) -> None:
    sent = written(segment, 0.5)
    copied = copy_verified(sent, segment)[SCALES[0]]
    segment.view(0, 4)[2] ^= 1
    assert float(copied) == 0.5
    with pytest.raises(CorruptTensorError, match="SHA-256 differs"):
        copy_verified(sent, segment)
