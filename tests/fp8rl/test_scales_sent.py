"""A run whose scales are not sent, or not set, stops at its first step and names the layers.

Each case runs the real command from a copy of the package in which one line is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fp8rl.run_helpers import PATIENCE, steps, write_config

ROOT = Path(__file__).parents[2]
ROOMS = ("quant", "sync", "correction")

# what is left out -> (file, lines, what the run says of the first scale)
LEFT_OUT = {
    "the line that sends the scales": (
        "sync/update_writer.py",
        [
            "            self._record(name, tensor, self._layout.scales, "
            "self._append(as_bytes(tensor)))\n"
        ],
        "version 0 lacks 6 tensors: model.layers.0.self_attn.attn.q_scale",
    ),
    "the line that sets them, and the engine's own comparison": (
        "sync/transaction.py",
        [
            "        write_scales(self._model, scales)\n",
            "        _raise_if_any(scale_differences(self._model, scales))\n",
        ],
        "6 differ: model.layers.0.self_attn.attn.q_scale: the engine holds [1.0, 1.0], published",
    ),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("what", LEFT_OUT)
def test_without_it_the_run_stops_at_the_first_step_and_names_the_layers(
    what: str, tmp_path: Path
) -> None:
    file, lines, said = LEFT_OUT[what]
    copy = copy_package(tmp_path / "copy")
    text = (copy / "fp8rl" / file).read_text()
    for line in lines:
        assert text.count(line) == 1, line
        text = text.replace(line, line.replace(line.strip(), "pass"))
    (copy / "fp8rl" / file).write_text(text)

    folder = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fp8rl", "train", str(write_config(tmp_path))),
            *(f"run_dir={folder}", "warmup.steps=0", "steps=2"),
        ],
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert "model.layers.1.self_attn.attn.v_scale" in done.stderr or "6 differ" in done.stderr
    assert steps(folder) == []  # nothing was sampled


def copy_package(folder: Path) -> Path:
    """The package as an importable folder, its rooms in place of the links to them."""
    shutil.copytree(ROOT / "fp8rl", folder / "fp8rl", ignore=shutil.ignore_patterns("__pycache__"))
    assert all((folder / "fp8rl" / room / "__init__.py").is_file() for room in ROOMS)
    return folder
