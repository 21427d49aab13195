"""A Hugging Face checkpoint folder: what it holds, checked before a byte of a weight is read.

A checkpoint is one file, model.safetensors, or several, named by the `weight_map` (tensor -> file)
of model.safetensors.index.json, beside the model's config.json. Every header is read here, and the
index is compared with them, so a missing shard or tensor is said at once, with its name.

Source: transformers, utils/hub. Left out: pickled checkpoints (`.bin`), which are refused.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from fp8rl.quant.checkpoint_file import Shard, StoredTensor, is_text_map, open_shard, parse_json
from fp8rl.quant.errors import CheckpointFormatError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
CONFIG_FILE: Final = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers and index fit together; make one with `open`."""

    folder: Path
    config: Mapping[str, Any]
    config_digest: str
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read config.json, the index and every header of a folder.

        Raises CheckpointFormatError naming the file and, where there is one, the tensor.
        """
        if not folder.is_dir():
            raise CheckpointFormatError(f"{folder}: is not a folder; give a checkpoint's folder")
        config, digest = _read_config(folder / CONFIG_FILE)
        index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
        if index_path.exists():
            index = _read_index(index_path)
            files = sorted(set(index.values()))
            if single.exists() and files != [SINGLE_FILE]:
                raise CheckpointFormatError(
                    f"{folder}: holds {SINGLE_FILE} and an {INDEX_FILE} that names other files; "
                    "loaders disagree about which one is meant, so remove one of them"
                )
            shards = tuple(_open_indexed(folder, file, index) for file in files)
            _check_index(index, shards)
        elif single.exists():
            shards = (open_shard(single),)
        else:
            raise _no_weights(folder)
        return cls(folder, config, digest, shards)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name, in the order of the shards."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointFormatError(
            f"{path}: is missing; a checkpoint's folder has the model's {CONFIG_FILE}"
        ) from error
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json(path, raw, "file"), hashlib.sha256(raw).hexdigest()


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map`: tensor name -> file name."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from error
    weight_map = parse_json(path, raw, "file").get("weight_map")
    if not is_text_map(weight_map) or not weight_map:
        raise CheckpointFormatError(f"{path}: must have a weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointFormatError(
                f"{path}: tensor {name!r} is said to lie in {file!r}, which is no safetensors file "
                "of this folder"
            )
    return weight_map


def _open_indexed(folder: Path, file: str, index: Mapping[str, str]) -> Shard:
    path = folder / file
    if not os.path.isfile(path):  # also for a name that no file can have
        holds = [name for name, where in index.items() if where == file]
        raise CheckpointFormatError(
            f"{path}: is missing; {INDEX_FILE} names it for {len(holds)} tensor(s), such as "
            f"{holds[0]!r}. Copy or download it again"
        )
    return open_shard(path)


def _check_index(index: Mapping[str, str], shards: tuple[Shard, ...]) -> None:
    """Raise unless index and headers name the same tensors in the same files."""
    for shard in shards:
        held = {tensor.name for tensor in shard.tensors}
        for name in held:
            if index.get(name) != shard.path.name:
                raise CheckpointFormatError(
                    f"{shard.path}: holds tensor {name!r}, for which {INDEX_FILE} names "
                    f"{index.get(name, 'no file')}; the two are not of one checkpoint"
                )
        for name, file in index.items():
            if file == shard.path.name and name not in held:
                raise CheckpointFormatError(
                    f"{shard.path}: lacks tensor {name!r}, which {INDEX_FILE} says it holds"
                )


def _no_weights(folder: Path) -> CheckpointFormatError:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return CheckpointFormatError(
            f"{folder / pickled[0]}: is a pickle, which can run code when it is loaded and is not "
            "read here; save the model anew with transformers' save_pretrained, which writes "
            "safetensors"
        )
    return CheckpointFormatError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
