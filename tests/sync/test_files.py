"""Versions as files: complete or not there, followed in order, and never believed.

The engine at the end of the files is the receiver's own parts without a model: inbox, staging,
admission and mirror. A live engine follows files in test_many_engines.py.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from fp8rl.quant import KVScaleError, QuantPlan
from fp8rl.sync import FileFollower, Files, Publisher, TransportError
from fp8rl.sync.admission import admit_weights, unpack
from fp8rl.sync.errors import CorruptTensorError, ManifestError
from fp8rl.sync.file_store import FileStore, manifest_name, payload_name
from fp8rl.sync.inboxes import open_inbox
from fp8rl.sync.manifest import Manifest, parse_manifest
from fp8rl.sync.mirror import Mirror
from fp8rl.sync.source import IterableSource
from fp8rl.sync.staging import Staging
from fp8rl.sync.transport import Inbox, parse_introduction, parse_stage
from tests import helpers

PLAN = QuantPlan.from_hf_config(helpers.hf_config())
EXPECTED = {tensor.name: tensor for tensor in PLAN.engine_tensors()}


class Engine:
    """Takes in updates as a worker's receiver does, but for the model."""

    def __init__(self) -> None:
        self.staging = Staging(EXPECTED.values())
        self.held: Mirror | None = None
        self.ready: tuple[Manifest, dict[str, torch.Tensor]] | None = None
        self.inbox: Inbox | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.inbox = open_inbox(parse_introduction(init_info["transport"]), 0)

    def start_weight_update(self) -> None:
        self.staging.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "stage" in update_info:
            assert self.inbox is not None
            self.staging.receive(parse_stage(update_info["stage"]), self.inbox)
            return
        manifest = parse_manifest(update_info["manifest"])
        payload = self.staging.take(manifest.payload_nbytes)
        admit_weights(manifest, EXPECTED, self.held)
        self.ready = manifest, unpack(manifest, payload, self.held)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        assert self.ready is not None
        manifest, changed = self.ready
        self.held = Mirror.of(manifest, self.held, changed, {}, keep=True)


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Those of one model; a seed changes a few of them by one step of BF16."""
    tensors = helpers.weights(0)
    norm = tensors["model.norm.weight"]
    norm.view(torch.int16)[seed] += 1
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    up.view(-1)[seed * 7] *= 1.5
    return tensors


class Trainer:
    """Publishes into a store."""

    def __init__(self, url: str, **options: Any) -> None:
        self.files = Files(url)
        self.publisher = Publisher(PLAN, self.files, transport=self.files, **options)

    def publish(self, version: int, seed: int | None = None) -> str:
        source = IterableSource(weights(version if seed is None else seed))
        report = self.publisher.publish(source, version=version, kv_scales=None)
        assert report is not None
        return report.kind


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, and a store that is none."""
    if request.param == "folder":
        yield str(tmp_path / "store")
    else:
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()


def same(held: Mirror | None, engine: Engine) -> bool:
    assert held is not None and engine.held is not None
    return held.base == engine.held.base and all(
        torch.equal(held.weights[n].view(torch.uint8), engine.held.weights[n].view(torch.uint8))
        for n in EXPECTED
    )


def test_a_full_version_is_a_file_that_any_tool_reads(tmp_path: Path) -> None:
    Trainer(str(tmp_path)).publish(3)
    loaded = load_file(tmp_path / payload_name(3))
    engine = Engine()
    assert FileFollower(str(tmp_path), engine).step() == 3
    assert engine.held is not None and engine.held.base.version == 3
    for name in EXPECTED:
        held = engine.held.weights[name]
        assert loaded[name].dtype == held.dtype and loaded[name].shape == held.shape
        assert torch.equal(loaded[name].view(torch.uint8), held.view(torch.uint8))


def test_followers_get_there_from_anywhere_in_the_chain(url: str) -> None:
    trainer = Trainer(url, deltas=True)
    early, late = Engine(), Engine()
    assert trainer.publish(1) == "full"
    follower = FileFollower(url, early)
    assert follower.step() == 1 and follower.step() is None
    assert [trainer.publish(version) for version in (2, 3, 4)] == ["delta"] * 3
    assert follower.step() == 4  # 2, 3, 4
    assert FileFollower(url, late).step() == 4  # 1, 2, 3, 4
    assert same(early.held, late)


def test_full_versions_come_again_and_old_chains_go(tmp_path: Path) -> None:
    trainer = Trainer(str(tmp_path), deltas=True, full_every=3)
    kinds = [trainer.publish(version) for version in range(8)]
    assert kinds == ["full", "delta", "delta"] * 2 + ["full", "delta"]
    assert FileStore(str(tmp_path)).versions() == [3, 4, 5, 6, 7]
    engine = Engine()
    assert FileFollower(str(tmp_path), engine).step() == 7


def test_a_delta_is_small(tmp_path: Path) -> None:
    trainer = Trainer(str(tmp_path), deltas=True)
    trainer.publish(1)
    trainer.publish(2)
    full, delta = (os.stat(tmp_path / payload_name(version)).st_size for version in (1, 2))
    assert delta < full / 50


def test_kv_scales_cannot_follow_through_files(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    with (
        Publisher(PLAN, files, transport=files, kv_layers=helpers.LAYERS) as publisher,
        pytest.raises(KVScaleError, match="measure them in the trainer"),
    ):
        publisher.publish(helpers.source(0), version=1, kv_scales=lambda: helpers.scales(1))
    assert FileStore(str(tmp_path)).versions() == []


def test_an_older_version_is_refused_also_by_a_new_trainer(tmp_path: Path) -> None:
    Trainer(str(tmp_path)).publish(5)
    with pytest.raises(ManifestError, match="version 5 is not newer than 5"):
        Trainer(str(tmp_path)).publish(5)
    assert FileStore(str(tmp_path)).versions() == [5]


def test_a_chain_with_another_base_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(str(tmp_path), deltas=True)
    trainer.publish(1)
    trainer.publish(2)
    FileStore(str(tmp_path)).remove(1)
    other = Trainer(str(tmp_path / "other"))
    other.publish(1, seed=9)
    for name in (manifest_name(1), payload_name(1)):
        (tmp_path / "other" / name).rename(tmp_path / name)
    with pytest.raises(ManifestError, match="builds on version 1 with other weights"):
        FileFollower(str(tmp_path), Engine()).step()


DYING = """
import os, sys
from tests.sync.test_files import Trainer
from fp8rl.sync import file_store
trainer = Trainer(sys.argv[1])
trainer.publish(1)
moves = iter(range(int(sys.argv[2])))
move = trainer.files._store._fs.mv
def dying(*names, **options):
    if next(moves, None) is None:
        os._exit(9)
    move(*names, **options)
trainer.files._store._fs.mv = dying
trainer.publish(2)
"""


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_trainer_that_dies_while_writing_leaves_the_version_before(
    renamed: int, tmp_path: Path
) -> None:
    died = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), str(renamed)], timeout=60)
    assert died.returncode == 9
    left = sorted(path.name for path in tmp_path.iterdir())
    assert any(name.startswith(".partial-") for name in left)
    engine = Engine()
    assert FileFollower(str(tmp_path), engine).step() == 1
    trainer = Trainer(str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".partial-")]
    trainer.publish(2)
    assert FileFollower(str(tmp_path), engine).step() == 2


def test_a_full_disk_is_named_and_the_store_is_as_before(tmp_path: Path) -> None:
    trainer = Trainer(str(tmp_path))
    trainer.publish(1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TransportError, match=r"cannot take .*No space left on device"):
            trainer.publish(2)
    assert FileStore(str(tmp_path)).versions() == [1]
    trainer.publish(2)
    assert FileFollower(str(tmp_path), Engine()).step() == 2


def edit(path: Path, change: Callable[[dict[str, Any]], None], *, resign: bool) -> None:
    """Change the manifest in a file; ``resign``: by somebody who knows how its digest is made."""
    from fp8rl.sync.file_store import _digest

    raw = json.loads(path.read_text())
    change(raw["manifest"])
    if resign:
        raw["sha256"] = _digest(raw["manifest"])
    path.write_text(json.dumps(raw))


def first(manifest: dict[str, Any], **fields: Any) -> None:
    manifest["tensors"][0].update(fields)


Attack = Callable[[Path], object]
ATTACKS: dict[str, tuple[Attack, type[Exception], str]] = {
    "a pickle for a manifest": (
        lambda d: (d / manifest_name(1)).write_bytes(pickle.dumps({"version": 1})),
        ManifestError,
        "refused",
    ),
    "a pickle for a payload": (
        lambda d: (d / payload_name(1)).write_bytes(pickle.dumps(list(range(10**5)))),
        ManifestError,
        "no safetensors file",
    ),
    "a truncated payload": (
        lambda d: os.truncate(d / payload_name(1), 10**5),
        ManifestError,
        "truncated or replaced",
    ),
    "a longer payload": (
        lambda d: os.truncate(d / payload_name(1), 10**7),
        ManifestError,
        "truncated or replaced",
    ),
    "an empty payload": (lambda d: os.truncate(d / payload_name(1), 0), ManifestError, "safetens"),
    "no payload": (lambda d: (d / payload_name(1)).unlink(), TransportError, "cannot give"),
    "a truncated manifest": (
        lambda d: os.truncate(d / manifest_name(1), 1000),
        ManifestError,
        "refused",
    ),
    "a manifest that was changed": (
        lambda d: edit(d / manifest_name(1), lambda m: first(m, digest="0" * 32), resign=False),
        CorruptTensorError,
        "SHA-256 differs",
    ),
    "a wrong digest": (
        lambda d: edit(d / manifest_name(1), lambda m: first(m, digest="0" * 32), resign=True),
        CorruptTensorError,
        "fingerprints differ",
    ),
    "a name that climbs": (
        lambda d: edit(d / manifest_name(1), lambda m: first(m, name="../../x"), resign=True),
        ManifestError,
        "tensors.0.name",
    ),
    "places that overlap": (
        lambda d: edit(
            d / manifest_name(1),
            lambda m: m["tensors"][1]["parcel"].update(offset=0),
            resign=True,
        ),
        ManifestError,
        "overlap|not a multiple",
    ),
    "a huge shape": (
        lambda d: edit(d / manifest_name(1), lambda m: first(m, shape=[2**40, 2**20]), resign=True),
        ManifestError,
        "parcel of",
    ),
    "a huge payload": (
        lambda d: edit(d / manifest_name(1), lambda m: m.update(payload_nbytes=2**60), resign=True),
        ManifestError,
        "truncated or replaced",
    ),
    "another version": (
        lambda d: edit(d / manifest_name(1), lambda m: m.update(version=9), resign=True),
        ManifestError,
        "holds a manifest of version 9",
    ),
    "a code field": (
        lambda d: edit(d / manifest_name(1), lambda m: m.update(code="x"), resign=True),
        ManifestError,
        "code",
    ),
    "another model": (
        lambda d: edit(
            d / manifest_name(1), lambda m: first(m, name="model.embed.weight"), resign=True
        ),
        ManifestError,
        "truncated or replaced",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_store_is_refused_and_nothing_outside_it_is_written(
    attack: str, tmp_path: Path
) -> None:
    do, error, named = ATTACKS[attack]
    store = tmp_path / "a" / "store"
    Trainer(str(store)).publish(1)
    do(store)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    engine = Engine()
    with pytest.raises(error, match=named):
        FileFollower(str(store), engine).step()
    assert engine.held is None
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    Trainer(str(store)).publish(10)
    assert FileFollower(str(store), engine).step() == 10


def test_bytes_flipped_in_the_payload_are_found(tmp_path: Path) -> None:
    Trainer(str(tmp_path)).publish(1)
    raw = bytearray((tmp_path / payload_name(1)).read_bytes())
    raw[-1000] ^= 1
    (tmp_path / payload_name(1)).write_bytes(raw)
    with pytest.raises(CorruptTensorError, match="fingerprints differ"):
        FileFollower(str(tmp_path), Engine()).step()
