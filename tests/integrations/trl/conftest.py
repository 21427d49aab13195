"""These tests need the real TRL: `make test-verl` runs them in an environment of its own."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("trl") is None:
    collect_ignore_glob = ["test_*.py"]
