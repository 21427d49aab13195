"""A conversion that is killed at any moment leaves no destination, and the next one goes on."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from fp8rl.quant import convert, convert_chunk
from fp8rl.quant.convert import Conversion, convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions
from fp8rl.quant.errors import ConversionError

from .checkpoint_files import config_of, file_bytes, load, random_tensors, save
from .convert_worker import CHUNK, MARK_BYTES

ROOT = Path(__file__).parents[2]
REPORT = ConvertOptions(report=True)


@dataclass(frozen=True)
class Finished:
    """A conversion that came to its end: what it gave, its files, the chunks it did itself."""

    result: Conversion
    files: dict[str, bytes]
    chunks: int


def finish(source, destination, options=REPORT, *, force=False):
    seen = []
    result = convert_checkpoint(source, destination, options, force=force, on_progress=seen.append)
    assert not destination.with_name(f"{destination.name}.partial").exists()
    moved = sum(a.done < b.done for a, b in pairwise(seen))
    return Finished(result, file_bytes(destination), moved)


def start(source, destination, *when, force="keep"):
    worker = [sys.executable, "-m", "tests.quant.convert_worker"]
    arguments = [*worker, str(source), str(destination), force, *map(str, when)]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def killed(*arguments, **options):
    process = start(*arguments, **options)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, stderr


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (convert, convert_chunk):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(convert, "MARK_BYTES", MARK_BYTES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = config_of("qwen3", num_hidden_layers=2)
    return save(tmp_path_factory.mktemp("a") / "source", config, random_tensors(config), shards=2)


@pytest.fixture
def unbroken(source, tmp_path_factory):
    """A conversion that nothing stopped."""
    done = finish(source, tmp_path_factory.mktemp("b") / "fp8")
    assert done.result.resumed_bytes == 0
    assert len(done.result.errors) == 14
    return done


@pytest.fixture(scope="module")
def left(source, tmp_path_factory):
    """What a process left that was killed in the second file."""
    destination = tmp_path_factory.mktemp("c") / "fp8"
    killed(source, destination, "chunk", 40)
    assert not destination.exists()
    return destination.with_name("fp8.partial")


@pytest.fixture
def destination(left, tmp_path):
    """Where a conversion was killed in the middle."""
    shutil.copytree(left, tmp_path / "fp8.partial")
    return tmp_path / "fp8"


def test_killed_again_and_again_it_goes_on_to_the_same_bytes(source, unbroken, tmp_path):
    destination = tmp_path / "fp8"
    for moment in (("chunk", 0), ("chunk", 20), ("chunk", 10), ("complete",)):
        killed(source, destination, *moment)
        assert not destination.exists()
    done = finish(source, destination)
    assert done.result.resumed_bytes == sum(t.nbytes for t in load(source).values())
    assert done.chunks == 0
    assert done.files == unbroken.files
    assert done.result.errors == unbroken.result.errors
    assert list(tmp_path.iterdir()) == [destination]


def test_what_was_done_is_not_done_again(source, unbroken, destination):
    done = finish(source, destination)
    assert 0 < done.chunks < unbroken.chunks / 2
    assert done.files == unbroken.files
    assert done.result.errors == unbroken.result.errors


@pytest.mark.parametrize("rename", [1, 2])
def test_killed_while_it_replaces_there_is_the_old_one_or_none_and_then_the_new_one(
    rename, source, unbroken, tmp_path
):
    destination = tmp_path / "fp8"
    shutil.copytree(source, destination)
    old = file_bytes(destination)
    killed(source, destination, "rename", rename, force="force")
    assert (file_bytes(destination) if destination.exists() else None) == (
        old if rename == 1 else None
    )
    assert finish(source, destination, force=True).files == unbroken.files
    assert list(tmp_path.iterdir()) == [destination]


def test_a_torn_line_of_progress_is_not_believed(source, unbroken, destination):
    progress = destination.with_name("fp8.partial") / "progress.jsonl"
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    done = finish(source, destination)
    assert done.files == unbroken.files
    assert done.result.errors == unbroken.result.errors


def test_with_other_options_it_does_not_go_on_unless_it_may_start_over(source, destination):
    with pytest.raises(ConversionError, match=r"options report was True and is False.*--force"):
        finish(source, destination, ConvertOptions())
    assert not destination.exists()
    done = finish(source, destination, ConvertOptions(), force=True)
    assert (done.result.resumed_bytes, done.result.errors) == (0, ())


def test_with_another_source_it_does_not_go_on(source, destination, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    shard = copy / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(0, 0))
    with pytest.raises(ConversionError, match=f"source {shard.name} has changed since"):
        finish(copy, destination)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(ConversionError, match=r"source config\.json has changed since"):
        finish(copy, destination)


def test_where_nothing_was_done_yet_other_options_are_no_matter(source, unbroken, tmp_path):
    with pytest.raises(ZeroDivisionError):
        convert_checkpoint(
            source, tmp_path / "fp8", ConvertOptions(), on_progress=lambda progress: 1 / 0
        )
    assert (tmp_path / "fp8.partial" / "files").is_dir()
    assert finish(source, tmp_path / "fp8").files == unbroken.files


def test_what_was_begun_and_then_damaged_is_not_built_upon(source, destination):
    partial = destination.with_name("fp8.partial")
    begun = next((partial / "files").glob("*.safetensors"))
    os.truncate(begun, 100)
    with pytest.raises(ConversionError, match=f"{begun}: is not as it was left; delete {partial}"):
        finish(source, destination)


def test_two_processes_do_not_convert_to_one_place(source, unbroken, tmp_path):
    first = start(source, tmp_path / "fp8", "wait")
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "waiting\n"
        with pytest.raises(ConversionError, match="another process is converting there"):
            finish(source, tmp_path / "fp8", force=True)
    finally:
        first.kill()
        first.communicate()
    assert finish(source, tmp_path / "fp8").files == unbroken.files
