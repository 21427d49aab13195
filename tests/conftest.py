"""What all tests share: shapes are checked while they run, and GPU tests need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
PYDANTIC = {
    "config",
    "kv_rule",
    "manifest",
    "stages",
    "streams",
    "losses_config",
}  # records that check themselves, with `Self` in their methods
COMPILED = {"compiled", "triton_kernel"}  # torch.compile or Triton would compile the checks too

# Before any import of the rooms: every annotated call in them is checked by beartype.
install_import_hook(
    [
        f"fp8rl.{room}.{file.stem}"
        for room in ("quant", "sync", "correction")
        for file in (ROOT / room).glob("*.py")
        if file.stem not in PYDANTIC | COMPILED | {"__init__"}
    ],
    "beartype.beartype",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
