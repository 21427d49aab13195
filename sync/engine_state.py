"""What a live vLLM model expects, holds, and is given; on one worker of an engine.

    expected_tensors, units    which tensors it takes, and which of them together (engine_units.py)
    load, abandon_reload       give it new ones, all or some (engine_load.py)
    differences                read back and compare what its kernels hold (engine_kernels.py)

Names are those of a Hugging Face checkpoint, tensors are whole ones: each worker of a
tensor-parallel engine is given the same and takes, and proves, its own part. KV scales have a file
of their own, ``engine_scales.py``; no load touches them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fp8rl.sync.engine_kernels import compare
from fp8rl.sync.engine_load import abandon_reload, fit_biases, load
from fp8rl.sync.engine_units import expected_tensors, units, units_of

__all__ = [
    "abandon_reload",
    "differences",
    "expected_tensors",
    "fit_biases",
    "load",
    "units",
]


def differences(model: nn.Module, sent: Mapping[str, torch.Tensor]) -> list[str]:
    """Compare what the model's kernels hold with what was sent; one line for each difference.

    Args:
        model: the live model of this worker, after the update.
        sent: whole units of weights by Hugging Face name, whole CPU tensors. Other units are not
            looked at.

    Raises:
        ManifestError: an unknown name, or a unit given in part.
        ReadBackError: a kernel's layout is not known here, so nothing can be proven.
    """
    return [
        f"{name}: {wrong} of {read} elements that the engine holds differ from what was sent"
        for unit in units_of(model, sent)
        for name, wrong, read in compare(unit, sent)
        if wrong
    ]
