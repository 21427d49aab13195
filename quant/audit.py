"""Does an engine hold what the plan says? Every difference, by tensor name.

An engine that left a layer in BF16, or quantized one that should stay, still answers: only its
log-probs are off. So the engine's own list of tensors (names, dtypes, shapes, taken from its
modules) is compared with the plan's before anything is served. One fact gives one difference: a
weight of the wrong precision is named once, and its scales are not named again.

Left out: values, which the read-back after each update compares; scales of the KV cache, of which
the plan knows nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch

from fp8rl.quant.tensor import FP8_DTYPE, scale_shape

SCALE_SUFFIX: Final = "_scale_inv"
_KV_SUFFIXES: Final = (".q_scale", ".k_scale", ".v_scale")

DifferenceKind = Literal["missing", "unexpected", "precision", "dtype", "shape", "scales"]


class EngineTensor(NamedTuple):
    """One tensor as the engine receives it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlanDifference:
    """One tensor on which plan and engine disagree.

    kind: "missing" and "unexpected" are the engine's view; "precision" is FP8 on one side only;
    "scales" are missing or fit another block size; "dtype" and "shape" are of the tensor itself.
    """

    name: str
    kind: DifferenceKind
    problem: str

    def __str__(self) -> str:
        """Return one line for people."""
        return f"{self.name}: {self.problem}"


def differences(
    planned: Iterable[EngineTensor], found: Iterable[EngineTensor], block_size: tuple[int, int]
) -> list[PlanDifference]:
    """Name every difference, the plan's tensors first and in its order.

    planned: what the engine should take. found: what it reports, whole tensors under checkpoint
    names; KV scales among them are passed over.
    """
    plan = {t.name: t for t in planned}
    engine = {t.name: t for t in found if not t.name.endswith(_KV_SUFFIXES)}
    result: list[PlanDifference] = []
    for name in [*plan, *(name for name in engine if name not in plan)]:
        owner = name.removesuffix(SCALE_SUFFIX)
        if name != owner and (owner in plan or owner in engine):
            continue  # judged with its weight
        result.extend(_judge(name, plan, engine, block_size))
    return result


def _judge(
    name: str,
    plan: Mapping[str, EngineTensor],
    engine: Mapping[str, EngineTensor],
    block_size: tuple[int, int],
) -> Iterator[PlanDifference]:
    want, have = plan.get(name), engine.get(name)
    if have is None:
        yield PlanDifference(name, "missing", "planned, but not in the engine")
    elif want is None:
        yield PlanDifference(name, "unexpected", f"in the engine ({have.dtype}), but not planned")
    elif want.shape != have.shape:
        problem = f"shape {list(have.shape)} in the engine, planned {list(want.shape)}"
        yield PlanDifference(name, "shape", problem)
    elif want.dtype != have.dtype:
        kind: DifferenceKind = "precision" if FP8_DTYPE in (want.dtype, have.dtype) else "dtype"
        problem = f"{have.dtype} in the engine, planned {want.dtype}"
        yield PlanDifference(name, kind, problem)
    elif want.dtype == FP8_DTYPE:
        yield from _judge_scales(name, engine, scale_shape(want.shape, block_size), block_size)


def _judge_scales(
    weight: str,
    engine: Mapping[str, EngineTensor],
    shape: tuple[int, ...],
    block_size: tuple[int, int],
) -> Iterator[PlanDifference]:
    name = weight + SCALE_SUFFIX
    have = engine.get(name)
    planned = f"planned float32 {list(shape)}, for blocks of {list(block_size)}"
    if have is None:
        yield PlanDifference(name, "scales", f"not in the engine, {planned}")
    elif have.shape != shape or have.dtype != torch.float32:
        problem = f"{have.dtype} {list(have.shape)} in the engine, {planned}"
        yield PlanDifference(name, "scales", problem)
