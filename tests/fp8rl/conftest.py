"""One uninterrupted tiny run, for all tests that compare with it or look at what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fp8rl.run_helpers import Command, End, write_config


@dataclass(frozen=True)
class Whole:
    """The run's config file, its folder, and how it ended."""

    config: Path
    folder: Path
    end: End


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """`fp8rl train tiny.yaml --json`, run to its end."""
    root = tmp_path_factory.mktemp("whole")
    config, folder = write_config(root), root / "run"
    command = Command(folder, config, f"run_dir={folder}", "--json")
    command.wait_for_a_step()
    return Whole(config, folder, command.end())
