"""The way back: a Hugging Face checkpoint into the GPTModel of a trainer rank, by the same table.

Every rank loads for itself, copies too, and reads of each tensor no more than its own part. All
names, shapes and dtypes of the checkpoint are checked, on every rank alike, before a weight is
touched. Rows that pad the vocabulary become zero, so that they are the same in every layout.

After it, an optimizer with masters must take the weights over (`reload_model_params`). Left out:
quantized checkpoints, whose weights no trainer computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8rl.quant.architectures import CheckpointTensor
from fp8rl.quant.checkpoint import Checkpoint
from fp8rl.quant.checkpoint_file import StoredTensor
from fp8rl.quant.shard_layout import Box
from fp8rl.sync.errors import SourceError
from fp8rl.sync.megatron_fp8 import holds_fp8
from fp8rl.sync.megatron_layout import Held, layout_of

_DTYPES: Final = (torch.bfloat16, torch.float32, torch.float16)
_SHOWN: Final = 4  # names in a message


@torch.no_grad()
def load_hf_checkpoint(
    model: nn.Module | Sequence[nn.Module],
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | Path,
) -> None:
    """Fill this rank's parameters; moves nothing between ranks.

    model: GPTModel or the list of its chunks, wrapped or not. hf_config: the checkpoint's
    config.json as a mapping. tensors: by Hugging Face name, whole, in BF16, FP16 or fp32; or a
    folder of safetensors, of which slices are read. Beside tied embeddings a checkpoint may store
    the head once more, which is passed over.

    Raises:
        SourceError: a tensor is missing, extra, or of another shape or dtype; nothing was written.
            As `MegatronSource` where the model does not fit `hf_config`.
        CheckpointFormatError: a file of the folder is missing, truncated or corrupt.
    """
    layout = layout_of(model, hf_config)
    with ExitStack() as files:
        source = _Folder(tensors, files) if isinstance(tensors, Path) else _Given(tensors)
        _check(source.stored, layout.tensors)
        fp8 = [holds_fp8(held) for held in layout.held]
        for held, is_fp8 in zip(layout.held, fp8, strict=True):
            _fill(held, source, is_fp8=is_fp8)


class _Given:
    """Tensors that are here."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.stored = tensors

    def read(self, name: str, box: Box) -> Tensor:
        return self.stored[name][box.slices]


class _Folder:
    """Tensors in the files of a checkpoint's folder, open until `files` closes."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        from safetensors import safe_open

        checkpoint = Checkpoint.open(folder)
        self._files = {
            shard.path: files.enter_context(safe_open(shard.path, "pt"))
            for shard in checkpoint.shards
        }
        self.stored = checkpoint.tensors

    def read(self, name: str, box: Box) -> Tensor:
        found: Tensor = self._files[self.stored[name].path].get_slice(name)[box.slices]
        return found


def _check(
    stored: Mapping[str, Tensor] | Mapping[str, StoredTensor], tensors: Iterable[CheckpointTensor]
) -> None:
    """Raise unless the checkpoint holds these tensors and no others."""
    expected = {t.name: t for t in tensors}
    tied = {"lm_head.weight"} - expected.keys()
    if missing := [name for name in expected if name not in stored]:
        raise SourceError(f"the checkpoint lacks {_some(missing)}, which its config describes")
    if extra := [name for name in stored if name not in expected and name not in tied]:
        raise SourceError(
            f"the checkpoint holds {_some(extra)}, which its config does not describe; give the "
            "config of this checkpoint, or remove what is not a weight"
        )
    for name, tensor in expected.items():
        found = stored[name]
        if tuple(found.shape) != tensor.shape or found.dtype not in _DTYPES:
            raise SourceError(
                f"the checkpoint's {name} is {found.dtype} {list(found.shape)}, expected "
                f"{list(tensor.shape)} in {', '.join(map(str, _DTYPES))}"
            )


def _fill(held: Held, source: _Given | _Folder, *, is_fp8: bool) -> None:
    """Write all parts of a matrix, and zeros where it has none."""
    parameter = held.parameter
    if parameter.dtype != held.dtype:  # Float16Module has cast an expert bias; Megatron undoes
        parameter.data = parameter.data.to(held.dtype)  # it at the first forward, in this way
    matrix = held.matrix()
    if is_fp8:
        matrix = torch.empty(held.shape, dtype=held.dtype, device=parameter.device)
    filled = 0
    for part in held.parts:
        values, start = source.read(part.name, part.box), 0
        for first, size in part.runs:
            matrix.narrow(part.dim, first, size).copy_(values.narrow(part.dim, start, size))
            start += size
        filled += start
    if not held.parts or filled < held.shape[held.parts[0].dim]:
        matrix.narrow(0, filled, held.shape[0] - filled).zero_()  # the vocabulary's padding
    if is_fp8:
        parameter.copy_(matrix)  # Transformer Engine quantizes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
