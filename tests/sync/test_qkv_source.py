"""What a watch is shown is what a module is given, whatever its other hooks make of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp8rl.sync.qkv_source import shown


def test_a_watch_sees_keys_before_a_hook_that_rounds_them_however_late_it_comes() -> None:
    """Else scales would be measured on what the last ones left (``engine_kv_round.py``)."""
    module, seen = nn.Identity(), []
    module.register_forward_pre_hook(lambda _, args: (args[0].clamp(max=1.0),))

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0])

    with shown([(module, see)]):
        given = torch.tensor([0.5, 7.0])
        assert module(given).tolist() == [0.5, 1.0]
    assert seen[0] is given
    module(given)
    assert len(seen) == 1, "and nothing stays behind"
