"""Checkpoints: whole or absent after a kill anywhere, and never silently wrong."""

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from fp8rl import checkpoint
from fp8rl.errors import CheckpointError


def state(step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    flat = torch.randn(48, generator=generator)
    return {
        "weight": flat[:32].view(4, 8).bfloat16(),
        "master": flat[:32].view(4, 8).t(),  # a view of a shared buffer, not contiguous
        "momentum": flat[32:],
        "tied": flat[32:],
        "rng": torch.get_rng_state(),
        "step": torch.tensor(step),
    }


def save(directory: Path, step: int) -> Path:
    extra = {"step": step, "prompts": {"drawn": 3}}
    return checkpoint.save(
        directory, step, state(step), rank=0, world_size=1, extra=extra, barrier=lambda: None
    )


def load(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(folder, rank=0, world_size=1)


def assert_is_state(loaded: checkpoint.Checkpoint, step: int, rank: int = 0) -> None:
    assert loaded.step == step
    assert loaded.tensors.keys() == state(step, rank).keys()
    for name, tensor in state(step, rank).items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor), name


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    folder = save(tmp_path / "checkpoints", 7)
    assert checkpoint.latest(tmp_path / "checkpoints") == folder
    assert_is_state(load(folder), 7)
    assert load(folder).extra == {"step": 7, "prompts": {"drawn": 3}}


def test_a_checkpoint_that_lacks_a_part_of_the_state_is_refused_by_name(tmp_path):
    loaded = load(save(tmp_path / "checkpoints", 7))
    loaded.require(["weight", "step"])
    with pytest.raises(CheckpointError, match=r"step 7 has no drift/warned, pool/drawn: an older"):
        loaded.require(["weight", "pool/drawn", "drift/warned"])


def test_extra_is_read_as_json_has_it(tmp_path):
    extra = {"best": {9: 0.1, 10: float("1e-300")}, "names": ("a", "b")}
    folder = checkpoint.save(
        tmp_path, 1, state(1), rank=0, world_size=1, extra=extra, barrier=lambda: None
    )
    assert load(folder).extra == {"best": {"9": 0.1, "10": 1e-300}, "names": ["a", "b"]}


def test_the_newest_two_are_kept_and_the_newest_is_by_number(tmp_path):
    for step in (5, 10, 100, 99_999_999):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-99999999"]
    assert_is_state(load(checkpoint.latest(tmp_path)), 99_999_999)


def test_a_step_is_saved_once(tmp_path):
    folder = save(tmp_path, 5)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert save(tmp_path, 5) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


def kill_at(monkeypatch, count: int) -> list[int]:
    """The ``count``-th call that changes the disk does not return; the list has the calls made."""
    calls = [0]

    def wrap(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            calls[0] += 1
            if calls[0] == count:
                raise Killed
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (os, "fsync"),
        (shutil, "rmtree"),
        (checkpoint, "save_file"),
        *((Path, name) for name in ("mkdir", "rename", "replace", "unlink")),
    ):
        wrap(owner, name)
    return calls


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = kill_at(patch, 0)
        for step in (1, 2, 3):
            save(tmp_path / "count", step)
    total = calls[0]
    assert total > 20
    seen = set()
    for count in range(1, total + 1):
        directory = tmp_path / str(count)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, count)
            for begun in (1, 2, 3):
                save(directory, begun)
        newest = checkpoint.latest(directory)
        if newest is None:
            assert begun == 1
        else:
            loaded = load(newest)
            assert loaded.step in (begun - 1, begun)
            assert_is_state(loaded, loaded.step)
            seen.add((begun, loaded.step))
        save(directory, 9)
        assert_is_state(load(checkpoint.latest(directory)), 9)
        assert len(list(directory.iterdir())) <= checkpoint.KEPT
    assert {(2, 1), (2, 2), (3, 2), (3, 3)} <= seen


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 1
    path.write_bytes(data[:-3] if how == "truncate" else data)
    if how == "delete":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", ["rank-0.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, file, how):
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    damage(newest / file, how)
    assert checkpoint.latest(tmp_path) == newest  # no silent step back
    with pytest.raises(
        CheckpointError, match=rf"step-00000010/{file}.*step-00000005 is whole"
    ) as e:
        load(newest)
    assert f"delete {newest}" in str(e.value)
    shutil.rmtree(newest)
    assert_is_state(load(checkpoint.latest(tmp_path)), 5)


def test_where_no_older_one_is_whole_the_error_says_so(tmp_path):
    for step in (5, 10):
        damage(save(tmp_path, step) / "rank-0.safetensors", "truncate")
    with pytest.raises(CheckpointError, match="No older checkpoint is whole"):
        load(checkpoint.latest(tmp_path))


def test_a_changed_manifest_is_found(tmp_path):
    folder = save(tmp_path, 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["extra"]["prompts"]["drawn"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="do not match its own SHA-256"):
        load(folder)


def test_every_rank_writes_and_reads_its_own_part(tmp_path, monkeypatch):
    world_size = 3
    save_file = checkpoint.save_file

    def slow_but_for_rank_0(tensors, path):
        time.sleep(0.0 if path.name == "rank-0.safetensors" else 0.05)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow_but_for_rank_0)
    barrier = threading.Barrier(world_size, timeout=20)
    folders: list[Path] = []

    def one_rank(rank: int) -> None:
        time.sleep(0.1 if rank == 0 else 0.0)  # it comes last and may not be overtaken
        for step in (1, 2, 2, 3):
            folder = checkpoint.save(
                tmp_path,
                step,
                state(step, rank),
                rank=rank,
                world_size=world_size,
                extra={"from": rank},
                barrier=lambda: barrier.wait() and None,
            )
            assert folder.is_dir()
            folders.append(folder)

    threads = [threading.Thread(target=one_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 * world_size
    for rank in range(world_size):
        loaded = checkpoint.load(checkpoint.latest(tmp_path), rank=rank, world_size=world_size)
        assert_is_state(loaded, 3, rank)
        assert loaded.extra == {"from": 0}
    with pytest.raises(CheckpointError, match=r"written by 3 ranks, this run has 2"):
        checkpoint.load(checkpoint.latest(tmp_path), rank=0, world_size=2)
