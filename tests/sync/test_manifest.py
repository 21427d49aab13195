"""The manifest is checked whole before anything is read, and a hostile one is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8rl.sync.errors import ManifestError
from fp8rl.sync.manifest import ALIGNMENT, align, digest, parse_manifest

GOOD: dict[str, Any] = {
    "version": 3,
    "tensors": [
        {
            "name": "model.layers.0.mlp.up_proj.weight",
            "dtype": "float8_e4m3fn",
            "shape": [128, 256],
            "offset": 0,
            "nbytes": 128 * 256,
            "digest": "0" * 64,
        },
        {
            "name": "model.norm.weight",
            "dtype": "bfloat16",
            "shape": [256],
            "offset": 128 * 256,
            "nbytes": 512,
            "digest": "f" * 64,
        },
    ],
    "kv_scales": {"version": 3, "observer": "amax", "tokens": 10},
}


def changed(tensor: int | None = None, **fields: Any) -> dict[str, Any]:
    raw = copy.deepcopy(GOOD)
    (raw if tensor is None else raw["tensors"][tensor]).update(fields)
    return raw


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
        (changed(0, nbytes=2**62), "tensors.0"),
        (changed(0, shape=[2**40, 2**40]), "tensors.0"),
        (changed(0, shape=[-128, -256]), "tensors.0.shape"),
        (changed(1, offset=-64), "tensors.1.offset"),
        (changed(1, offset=1), "tensors.1"),
        (changed(1, offset=64), "overlaps"),
        (changed(1, name=GOOD["tensors"][0]["name"]), "named twice"),
        (changed(0, digest="00"), "tensors.0.digest"),
        (changed(tensors=[]), "tensors"),
        (changed(version=-1), "version"),
        (changed(format=2), "format"),
        (changed(code="import os"), "code"),
        (changed(base_version=2), "base_version"),
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


@given(st.integers(0, 1023), st.integers(0, 7))
def test_one_flipped_bit_changes_the_digest(byte: int, bit: int) -> None:
    tensor = torch.arange(1024, dtype=torch.int32).to(torch.uint8)
    before = digest(tensor)
    tensor[byte] ^= 1 << bit
    assert digest(tensor) != before


def test_the_digest_is_of_the_bytes_whatever_the_dtype() -> None:
    tensor = torch.randn(64, dtype=torch.float32)
    assert digest(tensor) == digest(tensor.view(torch.bfloat16)) == digest(tensor.view(torch.uint8))
