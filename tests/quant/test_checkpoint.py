"""Reading and writing safetensors folders: what is wrong with one is said, with its name."""

import json
import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from fp8rl.quant.checkpoint import Checkpoint
from fp8rl.quant.checkpoint_file import DTYPES, open_shard, read_into
from fp8rl.quant.checkpoint_writer import FileLayout, OutputTensor, write_at
from fp8rl.quant.errors import CheckpointFormatError, CheckpointWriteError

from .checkpoint_files import INDEX, config_of, random_tensors
from .checkpoint_files import save as save_checkpoint

GOOD = save({"a": torch.arange(6).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    count = (end - begin) // 4
    return {"dtype": "F32", "shape": [count], "data_offsets": [begin, end]} | changes


CORRUPT = {
    "is truncated or no safetensors file": [b"", b"1234567", b"<html>Not found</html>", GOOD[:40]],
    "is truncated: tensor": [GOOD[:-1], GOOD[:-8]],
    "bytes after the last tensor belong to none": [GOOD + b"x"],
    "corrupt header: not JSON": [with_header(b"{"), with_header(b"\xff\xfe"), with_header(b"")],
    "corrupt header: JSON, but no object": [with_header([1])],
    "stands there twice": [with_header(b'{"a": {}, "a": {}}')],
    "__metadata__ must map text to text": [with_header({"__metadata__": {"a": 1}})],
    "must have dtype, shape and data_offsets": [
        with_header({"a": 1}),
        with_header({"a": {"dtype": "F32"}}),
    ],
    "'a' has shape": [
        with_header({"a": entry(0, 4, shape=[-1])}, bytes(4)),
        with_header({"a": entry(0, 4, shape=[True])}, bytes(4)),
        with_header({"a": entry(0, 4, shape="1")}, bytes(4)),
    ],
    "'a' has data_offsets": [
        with_header({"a": entry(4, 0, shape=[1])}, bytes(4)),
        with_header({"a": entry(0, 4, data_offsets=[0])}, bytes(4)),
    ],
    "is not known here": [with_header({"a": entry(0, 4, dtype="F4")}, bytes(4))],
    "takes 8 bytes, its offsets give 4": [with_header({"a": entry(0, 4, shape=[2])}, bytes(4))],
    "'b' overlaps": [with_header({"a": entry(0, 8), "b": entry(4, 8)}, bytes(8))],
    "'b' leaves a gap": [with_header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))],
}


@pytest.mark.parametrize(
    ("message", "raw"), [(message, raw) for message, raws in CORRUPT.items() for raw in raws]
)
def test_a_corrupt_file_is_named_with_what_is_wrong(message, raw, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointFormatError, match=re.escape(message)) as error:
        open_shard(path)
    assert str(path) in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointFormatError, match="truncated"):
        open_shard(path)


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES)), st.data())
def test_what_is_written_is_what_the_library_and_we_read(tmp_path_factory, tensors, data):
    folder = tmp_path_factory.getbasetemp()
    outputs = [OutputTensor(name, *kind) for name, kind in tensors.items()]
    layout = FileLayout.of("any.safetensors", outputs, {"format": "pt"})
    path = folder / layout.file
    path.unlink(missing_ok=True)
    layout.create(folder)
    contents = {t.name: data.draw(st.binary(min_size=t.nbytes, max_size=t.nbytes)) for t in outputs}
    for name in data.draw(st.permutations(list(contents))):  # in any order
        write_at(path, layout.offsets[name], memoryview(contents[name]))
    ours = open_shard(path)
    assert ours.size == layout.size
    assert ours.metadata == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == contents.keys() == {tensor.name for tensor in ours.tensors}
    for tensor in ours.tensors:
        assert (tensor.dtype, tensor.shape) == tensors[tensor.name]
        assert tensor.offset % tensor.dtype.itemsize == 0
        buffer = bytearray(tensor.nbytes)
        read_into(path, tensor.offset, memoryview(buffer))
        assert buffer == contents[tensor.name]
        assert found[tensor.name].dtype == tensor.dtype
        assert bytes(found[tensor.name].flatten().view(torch.uint8).tolist()) == buffer


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    [a, _] = open_shard(path).tensors
    path.write_bytes(GOOD[:-20])
    with pytest.raises(CheckpointFormatError, match=f"{path}: ended at byte"):
        read_into(path, a.offset, memoryview(bytearray(a.nbytes)))


@pytest.fixture
def sharded(tmp_path):
    config = config_of("qwen3", num_hidden_layers=1)
    return save_checkpoint(tmp_path / "source", config, random_tensors(config), shards=3)


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, message):
    with pytest.raises(CheckpointFormatError, match=message) as found:
        Checkpoint.open(folder)
    return found.value


def test_a_whole_checkpoint_opens_with_all_its_tensors(sharded):
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors.keys() == random_tensors(dict(checkpoint.config)).keys()
    assert [shard.path.name[:11] for shard in checkpoint.shards] == [
        "model-00001",
        "model-00002",
        "model-00003",
    ]


def test_a_missing_shard_is_named_with_a_tensor_of_it(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert refused(sharded, r"model-00002-of-00003.safetensors: is missing; .* 'model\.layers\.0\.")


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_named(sharded):
    change_index(sharded, lambda names: names.update({"ghost": names["model.norm.weight"]}))
    assert refused(sharded, "lacks tensor 'ghost'")


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded):
    first = "model-00001-of-00003.safetensors"
    change_index(sharded, lambda names: names.update({"model.norm.weight": first}))
    assert refused(sharded, "tensor 'model.norm.weight'")
    change_index(sharded, lambda names: names.pop("model.norm.weight"))
    assert refused(sharded, "tensor 'model.norm.weight', for which .* names no file")


def test_an_index_never_leads_out_of_the_folder(sharded):
    change_index(sharded, lambda names: names.update({"a": "../other.safetensors"}))
    assert refused(sharded, "'../other.safetensors', which is no safetensors file of this folder")


@pytest.mark.parametrize("raw", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(sharded, raw):
    (sharded / INDEX).write_text(raw)
    assert refused(sharded, f"{INDEX}: ")


def test_two_answers_to_which_weights_are_meant_are_refused(sharded):
    (sharded / "model.safetensors").write_bytes(GOOD)
    assert refused(sharded, "loaders disagree")


def test_a_folder_without_weights_config_or_existence_is_named(sharded, tmp_path):
    assert refused(tmp_path / "nowhere", "nowhere: is not a folder")
    (sharded / "config.json").rename(tmp_path / "config.json")
    assert refused(sharded, "config.json: is missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "config.json").rename(empty / "config.json")
    assert refused(empty, "holds neither model.safetensors nor")
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert refused(empty, "pytorch_model.bin: is a pickle")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    layout = FileLayout.of("a.safetensors", [OutputTensor("a", torch.float32, (2,))], {})
    with pytest.raises(CheckpointWriteError, match=r"nowhere/a\.safetensors: cannot be written"):
        layout.create(tmp_path / "nowhere")
