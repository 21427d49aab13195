"""A manifest comes in only if it names exactly what the engine takes, of one newer version."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.quant import EngineTensor, KVScaleError, QuantPlan
from fp8rl.sync.admission import admit_scales, admit_weights, as_bytes, unpack
from fp8rl.sync.delta import encode_delta
from fp8rl.sync.errors import BaseMismatchError, CorruptTensorError, ManifestError
from fp8rl.sync.fingerprint import fingerprint
from fp8rl.sync.manifest import (
    DTYPE_NAMES,
    Base,
    KVProvenance,
    Manifest,
    Parcel,
    TensorRecord,
    align,
)
from fp8rl.sync.mirror import Mirror
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
    return Manifest(
        version=version, payload_nbytes=end, tensors=tuple(records), kv_scales=kv_scales
    )


def record(name: str, dtype: Any, shape: Any, offset: int, nbytes: int) -> TensorRecord:
    return TensorRecord(
        name=name,
        dtype=DTYPE_NAMES[dtype],
        shape=shape,
        digest="0" * 32,
        parcel=Parcel(offset=offset, nbytes=nbytes),
    )


def held(version: int) -> Mirror:
    """An engine's mirror of that version."""
    base = Base(version=version, digest="b" * 64)
    return Mirror(base, {WEIGHTS[0].name: "0" * 32}, {WEIGHTS[0].name: torch.zeros(1)})


def test_weights_with_their_scales_come_in_and_so_do_weights_whose_scales_follow() -> None:
    assert admit_weights(manifest(EXPECTED), EXPECTED, None) is None
    assert admit_weights(manifest(EXPECTED), EXPECTED, held(VERSION - 1)) is None
    assert admit_weights(manifest(ONLY_WEIGHTS, "follow"), EXPECTED, None) is None
    assert admit_scales(manifest(SCALES), EXPECTED, awaited=VERSION) is None
    assert admit_weights(manifest(ONLY_WEIGHTS, None), ONLY_WEIGHTS, None) is None


@given(sent=st.sets(st.sampled_from(list(EXPECTED)), min_size=1))
def test_whatever_is_not_sent_is_missing_by_name(sent: set[str]) -> None:
    missing = [name for name in EXPECTED if name not in sent]
    if not missing:
        return
    alone = sent <= set(SCALES)
    with pytest.raises(ManifestError, match="came alone" if alone else re.escape(missing[0])):
        admit_weights(manifest(sent), EXPECTED, None)


@given(sent=st.sets(st.sampled_from(SCALES), min_size=1, max_size=len(SCALES) - 1))
def test_scales_that_follow_must_be_all_of_them(sent: set[str]) -> None:
    missing = [name for name in SCALES if name not in sent]
    with pytest.raises(ManifestError, match=rf"{len(missing)} missing: {re.escape(missing[0])}"):
        admit_scales(manifest(sent), EXPECTED, awaited=VERSION)


OTHER_LAYER = "model.layers.9.self_attn.attn.k_scale"
OLD = KVProvenance(version=VERSION - 1, observer="amax", tokens=10)
CASES: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "an older version": (
        lambda: admit_weights(manifest(EXPECTED), EXPECTED, held(VERSION)),
        ManifestError,
        f"version {VERSION} is not newer than {VERSION}",
    ),
    "scales alone": (
        lambda: admit_weights(manifest(SCALES), EXPECTED, None),
        ManifestError,
        "no weights of that version were applied",
    ),
    "scales of a layer that the engine has not": (
        lambda: admit_weights(manifest([*EXPECTED, OTHER_LAYER]), EXPECTED, None),
        ManifestError,
        f"1 not of this model: {OTHER_LAYER}",
    ),
    "scales of a layer that the engine has not, following": (
        lambda: admit_scales(manifest([*SCALES, OTHER_LAYER]), EXPECTED, awaited=VERSION),
        ManifestError,
        f"1 not of this model: {OTHER_LAYER}",
    ),
    "scales along although they are to follow": (
        lambda: admit_weights(manifest(EXPECTED, "follow"), EXPECTED, None),
        ManifestError,
        f"{len(SCALES)} not of this model: {SCALES[0]}",
    ),
    "scales to follow for a BF16 cache": (
        lambda: admit_weights(manifest(ONLY_WEIGHTS, "follow"), ONLY_WEIGHTS, None),
        KVScaleError,
        "this engine's KV cache is not FP8",
    ),
    "scales for a BF16 cache": (
        lambda: admit_weights(manifest(EXPECTED), ONLY_WEIGHTS, None),
        ManifestError,
        f"{len(SCALES)} not of this model: {SCALES[0]}",
    ),
    "no provenance": (
        lambda: admit_weights(manifest(EXPECTED, None), EXPECTED, None),
        KVScaleError,
        "no provenance",
    ),
    "no provenance of scales that follow": (
        lambda: admit_scales(manifest(SCALES, "follow"), EXPECTED, awaited=VERSION),
        KVScaleError,
        "no provenance",
    ),
    "measured on other weights": (
        lambda: admit_weights(manifest(EXPECTED, OLD), EXPECTED, None),
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


NORM = next(t for t in WEIGHTS if t.dtype == torch.bfloat16)


def sent_alone(
    name: str, tensor: torch.Tensor, base: Base | None = None, **fields: Any
) -> tuple[Manifest, torch.Tensor]:
    """A manifest of one tensor, and the payload in which it lies whole."""
    payload = as_bytes(tensor).clone()
    plain = record(name, tensor.dtype, tuple(tensor.shape), 0, len(payload))
    sent = plain.model_copy(update={"digest": fingerprint(tensor), **fields})
    made = Manifest(version=VERSION, base=base, payload_nbytes=len(payload), tensors=(sent,))
    return made, payload


def one(value: float) -> tuple[Manifest, torch.Tensor]:
    return sent_alone(SCALES[0], torch.tensor([value], dtype=torch.float32))


@given(value=st.floats(min_value=2.0**-126, max_value=2.0**100, width=32))
def test_any_positive_scale_comes_in_as_it_is(value: float) -> None:
    assert float(unpack(*one(value), None)[SCALES[0]]) == value


def test_a_measured_scale_of_one_is_a_scale() -> None:
    assert float(unpack(*one(1.0), None)[SCALES[0]]) == 1.0


@pytest.mark.parametrize("value", [0.0, -0.0, -0.5])
def test_a_scale_that_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(KVScaleError, match=re.escape(f"{SCALES[0]}: is {value}, must be above 0")):
        unpack(*one(value), None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(CorruptTensorError, match=re.escape(f"{SCALES[0]}: holds NaN or Inf")):
        unpack(*one(value), None)


def test_a_changed_byte_is_found_by_the_fingerprint() -> None:
    made, payload = sent_alone(NORM.name, torch.ones(NORM.shape, dtype=torch.bfloat16))
    assert torch.equal(unpack(made, payload, None)[NORM.name], torch.ones(NORM.shape).bfloat16())
    payload[1] ^= 1
    with pytest.raises(CorruptTensorError, match="fingerprints differ"):
        unpack(made, payload, None)


def of_base(tensor: torch.Tensor) -> Mirror:
    base = Base(version=VERSION - 1, digest="b" * 64)
    return Mirror(base, {NORM.name: fingerprint(tensor)}, {NORM.name: tensor})


def test_a_difference_is_applied_to_a_copy_of_what_is_held() -> None:
    old = torch.ones(4096, dtype=torch.bfloat16)
    new = old.clone()
    new[7] = 1.5
    mirror = of_base(old)
    encoded = encode_delta(as_bytes(old), as_bytes(new), width=2)
    assert encoded is not None
    made, _ = sent_alone(NORM.name, new, mirror.base)
    parcel = Parcel(encoding="delta", offset=0, nbytes=len(encoded))
    sent = made.tensors[0].model_copy(update={"parcel": parcel})
    made = made.model_copy(update={"tensors": (sent,)})
    assert torch.equal(unpack(made, encoded, mirror)[NORM.name], new)
    assert torch.equal(mirror.weights[NORM.name], torch.ones(4096).bfloat16())
    with pytest.raises(CorruptTensorError, match="fingerprints differ"):  # another base
        unpack(made, encoded, of_base(old * 2))


def test_what_comes_unchanged_must_be_what_is_held() -> None:
    old = torch.ones(64, dtype=torch.bfloat16)
    made, _ = sent_alone(NORM.name, old, of_base(old).base, parcel=None)
    nothing = torch.empty(0, dtype=torch.uint8)
    assert unpack(made, nothing, of_base(old)) == {}
    with pytest.raises(CorruptTensorError, match="comes unchanged with fingerprint"):
        unpack(made, nothing, of_base(old * 2))


def test_an_update_needs_the_base_that_it_was_taken_from() -> None:
    mirror = held(VERSION - 1)
    fits = manifest(EXPECTED).model_copy(update={"base": mirror.base})
    assert admit_weights(fits, EXPECTED, mirror) is None
    other = Base(version=VERSION - 1, digest="c" * 64)
    for found, engine in (
        ("holds no version yet", None),
        (f"holds version {VERSION - 1} (cccccccccccc)", Mirror(other, {}, mirror.weights)),
        ("keeps no mirror", Mirror(mirror.base, {}, {})),
    ):
        with pytest.raises(BaseMismatchError, match=re.escape(found)):
            admit_weights(fits, EXPECTED, engine)
