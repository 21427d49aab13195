"""The manifest is checked whole before anything is read, and a hostile one is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.sync.errors import ManifestError
from fp8rl.sync.manifest import ALIGNMENT, align, parse_manifest, state_digest

GOOD: dict[str, Any] = {
    "version": 3,
    "payload_nbytes": 128 * 256 + 512,
    "tensors": [
        {
            "name": "model.layers.0.mlp.up_proj.weight",
            "dtype": "float8_e4m3fn",
            "shape": [128, 256],
            "digest": "0" * 32,
            "parcel": {"encoding": "whole", "offset": 0, "nbytes": 128 * 256},
        },
        {
            "name": "model.norm.weight",
            "dtype": "bfloat16",
            "shape": [256],
            "digest": "f" * 32,
            "parcel": {"encoding": "whole", "offset": 128 * 256, "nbytes": 512},
        },
    ],
    "kv_scales": {"version": 3, "observer": "amax", "tokens": 10},
}


def changed(tensor: int | None = None, **fields: Any) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    (raw if tensor is None else raw["tensors"][tensor]).update(fields)
    return raw


def parcel(encoding: str, offset: int, nbytes: int) -> dict[str, Any]:
    return {"encoding": encoding, "offset": offset, "nbytes": nbytes}


BASE = {"version": 2, "digest": "a" * 64}


def test_a_good_manifest_survives_the_wire_unchanged() -> None:
    manifest = parse_manifest(GOOD)
    assert parse_manifest(manifest.model_dump(mode="json")) == manifest
    assert manifest.kv_scales is not None and manifest.kv_scales.version == 3


def test_scales_may_be_announced_to_follow() -> None:
    manifest = parse_manifest(changed(kv_scales="follow"))
    assert manifest.kv_scales == "follow"
    assert parse_manifest(manifest.model_dump(mode="json")) == manifest
    with pytest.raises(ManifestError, match="kv_scales"):
        parse_manifest(changed(kv_scales="later"))


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (changed(0, name="../../etc/passwd"), "tensors.0.name"),
        (changed(0, name="/proc/self/mem"), "tensors.0.name"),
        (changed(0, name="a" * 300), "tensors.0.name"),
        (changed(0, dtype="object"), "tensors.0.dtype"),
        (changed(0, parcel=parcel("whole", 0, 2**62)), "tensors.0"),
        (changed(0, parcel=parcel("whole", 0, 128 * 256 - 1)), "tensors.0"),
        (changed(0, parcel=parcel("pickle", 0, 128 * 256)), "tensors.0.parcel.encoding"),
        (changed(1, parcel=parcel("delta", 128 * 256, 512)), "tensors.1"),
        (changed(1, parcel=parcel("delta", 128 * 256, 100)), "no base version is named"),
        (changed(1, parcel=None), "no base version is named"),
        (changed(payload_nbytes=128 * 256), "outside the payload"),
        (changed(1, parcel=parcel("whole", 2**62, 512)), "outside the payload"),
        (changed(0, shape=[2**40, 2**40]), "tensors.0"),
        (changed(0, shape=[-128, -256]), "tensors.0.shape"),
        (changed(1, parcel=parcel("whole", -64, 512)), "tensors.1.parcel.offset"),
        (changed(1, parcel=parcel("whole", 1, 512)), "tensors.1"),
        (changed(1, parcel=parcel("whole", 64, 512)), "overlaps"),
        (changed(1, name=GOOD["tensors"][0]["name"]), "named twice"),
        (changed(0, digest="00"), "tensors.0.digest"),
        (changed(tensors=[]), "tensors"),
        (changed(version=-1), "version"),
        (changed(format=1), "format"),
        (changed(code="import os"), "code"),
        (changed(base=2), "base"),
        (changed(base={"version": 2, "digest": "no"}), "base.digest"),
        (changed(kv_scales={"version": 3}), "kv_scales"),
        ([], "manifest"),
        (b"\x80\x04pickle", "manifest"),
    ],
)
def test_a_hostile_or_broken_manifest_is_refused_where_it_is_wrong(raw: Any, named: str) -> None:
    with pytest.raises(ManifestError, match=named):
        parse_manifest(raw)


@given(st.integers(0, 2**40))
def test_align_gives_the_next_cache_line(offset: int) -> None:
    assert align(offset) % ALIGNMENT == 0
    assert 0 <= align(offset) - offset < ALIGNMENT


def test_on_a_base_a_tensor_may_come_as_a_difference_or_not_at_all() -> None:
    raw = changed(1, parcel=None) | {"base": BASE}
    raw["tensors"][0]["parcel"] = parcel("delta", 0, 77)
    manifest = parse_manifest(raw)
    assert manifest.base is not None and manifest.base.version == 2
    assert manifest.tensors[1].parcel is None and manifest.tensors[1].nbytes == 512


@pytest.mark.parametrize("sent", [None, parcel("delta", 0, 3)])
def test_a_kv_scale_is_never_taken_from_an_older_version(sent: Any) -> None:
    scale = {
        "name": "model.layers.0.self_attn.attn.k_scale",
        "dtype": "float32",
        "shape": [1],
        "digest": "0" * 32,
        "parcel": sent,
    }
    with pytest.raises(ManifestError, match="k_scale is a KV scale"):
        parse_manifest({**changed(tensors=[scale]), "base": BASE})


def test_the_state_is_told_by_names_dtypes_shapes_and_bytes_of_weights_alone() -> None:
    records = parse_manifest(GOOD).tensors
    digest = state_digest(records)
    assert state_digest(reversed(records)) == digest
    scale = records[1].model_copy(update={"name": "model.layers.0.self_attn.attn.k_scale"})
    assert state_digest([*records, scale]) == digest
    for field, value in (
        ("name", "model.norm.bias"),
        ("dtype", "float32"),
        ("shape", (2, 128)),
        ("digest", "e" * 32),
    ):
        assert state_digest([records[0], records[1].model_copy(update={field: value})]) != digest
    assert state_digest(records[:1]) != digest
