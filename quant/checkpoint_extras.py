"""The files of a checkpoint's folder that are not weights: tokenizer, templates, model code.

They are copied as they are, also from sub-folders. Not copied are hidden files, weights in any
format (they would be those of the model before it was converted), and a report.
"""

import os
import shutil
from pathlib import Path
from typing import Final

from fp8rl.quant.checkpoint import CONFIG_FILE
from fp8rl.quant.checkpoint_writer import sync_path, write_error
from fp8rl.quant.errors import CheckpointFormatError

REPORT_FOLDER: Final = "quantization_report"  # where the command line leaves its measurements
WEIGHT_SUFFIXES: Final = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth"),
    *(".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ckpt", ".npz"),
)


def extras_of(folder: Path) -> list[Path]:
    """The files to be copied; CheckpointFormatError for one that is not there behind its link."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != REPORT_FOLDER)
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or name.endswith(WEIGHT_SUFFIXES):
                continue
            if path == folder / CONFIG_FILE:
                continue
            if not path.is_file():
                raise CheckpointFormatError(f"{path}: is no file that can be copied; remove it")
            found.append(path)
    return found


def copy_extras(source: Path, destination: Path) -> None:
    """Copy them, links as what they point to."""
    for path in extras_of(source):
        target = destination / path.relative_to(source)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise write_error(target, error) from error
        sync_path(target)
