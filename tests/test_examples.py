"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_trainer_of_ones_own_learns_from_fp8_rollouts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_trainer.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [float(found) for found in re.findall(r"reward ([0-9.]+)", done.stdout)]
    assert len(rewards) == 12
    assert rewards[-1] > rewards[0] + 0.2
