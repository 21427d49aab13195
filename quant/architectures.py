"""What tensors a Hugging Face checkpoint holds, from its config alone.

Each tensor has a name, a shape, the part it plays, and, for the linears of decoder layers, how the
engine splits it over tensor-parallel ranks and which of its fused modules it becomes a part of.
Names are those of the hub, where experts lie one by one. What an architecture is made of stands in
`architectures_table.py`; this file reads the sizes of a config into it.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch

from fp8rl.quant.architectures_table import (
    ARCHITECTURES,
    KEYS,
    LAYER_NORMS,
    Architecture,
    Role,
    Row,
)
from fp8rl.quant.errors import QuantPlanError


class Split(NamedTuple):
    """How tensor parallelism divides a linear weight [N, K].

    dims: (0,) output rows, (1,) input columns, (0, 1) either, where it is not known which. units:
    indivisible pieces along it (heads, or single rows and columns); None where not known.
    replicated: ranks beyond `units` hold copies instead of nothing.
    """

    dims: tuple[int, ...]
    units: int | None
    replicated: bool = False


class CheckpointTensor(NamedTuple):
    """One tensor of a checkpoint; `layer`, `split` and `fused` are None outside decoder linears.

    fused: the engine's module that this tensor becomes a part of. ragged: its rows need not fill
    whole blocks. dtype: in which the engine holds it where it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    split: Split | None = None
    fused: str | None = None
    ragged: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor, as in `modules_to_not_convert`."""
        return self.name.rpartition(".")[0]


def checkpoint_tensors(config: Mapping[str, Any]) -> tuple[CheckpointTensor, ...]:
    """Return every tensor of the checkpoint that `config` (a config.json as a mapping) describes.

    Raises QuantPlanError for an architecture that is not known, a key that is missing or wrong.
    """
    architectures = config.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(architectures, list | tuple) or len(architectures) != 1:
        raise QuantPlanError(
            f"config key 'architectures' must name one architecture, found {architectures!r}; "
            f"known: {known}"
        )
    architecture = ARCHITECTURES.get(architectures[0])
    if architecture is None:
        raise QuantPlanError(
            f"architecture {architectures[0]!r} is not known; known: {known}. "
            "QuantPlan.from_tensors plans any other by rule, from its tensors' names and shapes"
        )
    return tuple(_Builder(config, architecture).tensors())


class _Builder:
    """Fills the rows of an architecture with the sizes of a config."""

    def __init__(self, config: Mapping[str, Any], architecture: Architecture) -> None:
        self._config, self._architecture = config, architecture
        for key, why in architecture.refused.items():
            if _flag(config, key):
                raise QuantPlanError(f"{key}=true is not supported: {why}")

    def tensors(self) -> Iterator[CheckpointTensor]:
        vocab, hidden = self._size("vocab"), self._size("hidden")
        yield CheckpointTensor("model.embed_tokens.weight", (vocab, hidden), "embedding")
        filled: dict[bool, list[CheckpointTensor]] = {}
        for layer in range(self._size("layers")):
            sparse = self._architecture.is_sparse(self._config, layer)
            if sparse not in filled:
                filled[sparse] = list(self._layer(sparse))
            prefix = f"model.layers.{layer}."
            for t in filled[sparse]:
                fused = prefix + t.fused if t.fused else None
                yield t._replace(name=prefix + t.name, layer=layer, fused=fused)
        yield CheckpointTensor("model.norm.weight", (hidden,), "norm")
        if not _flag(self._config, "tie_word_embeddings"):
            yield CheckpointTensor("lm_head.weight", (vocab, hidden), "head")

    def _layer(self, sparse: bool) -> Iterator[CheckpointTensor]:
        """Yield the tensors of one layer by the names of the table, experts one by one."""
        mlp = self._architecture.sparse if sparse else self._architecture.dense
        rows = [*self._architecture.attention, *mlp, *LAYER_NORMS]
        present = [row for row in rows if row.when is None or self._given(row.when)]
        for of_experts, group in groupby(present, lambda row: "*" in row.name):
            templates = [self._fill(row) for row in group]
            for expert in range(self._size("experts") if of_experts else 1):
                for t in templates:
                    yield t._replace(name=t.name.replace("*", str(expert)))

    def _fill(self, row: Row) -> CheckpointTensor:
        shape = tuple(self._value(size) for size in row.shape)
        split = Split((), 1)
        if row.cut is not None:
            split = Split((row.cut.dim,), self._value(row.cut.units), row.cut.replicated)
        only = split if row.role == "linear" else None
        return CheckpointTensor(
            row.name, shape, row.role, None, only, row.fused, row.ragged, row.dtype
        )

    def _value(self, expression: str) -> int:
        """Evaluate a sum of products of sizes, for instance `heads*nope+heads*rope`."""
        products = (map(self._size, term.split("*")) for term in expression.split("+"))
        return sum(map(math.prod, products))

    def _size(self, name: str) -> int:
        keys = [key for key in KEYS[name] if self._config.get(key) is not None]
        default = self._architecture.defaults.get(name)
        if not keys and default is not None:
            numerator, _, denominator = default.partition("/")
            return self._size(numerator) // (self._size(denominator) if denominator else 1)
        key = keys[0] if keys else KEYS[name][0]
        value = self._config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QuantPlanError(f"config key {key!r} must be a positive integer, found {value!r}")
        return value

    def _given(self, condition: str) -> bool:
        """Whether a config key is set (with `!`: is not), be it a flag or a size."""
        key = condition.removeprefix("!")
        value = self._config.get(key)
        if value is not None and not isinstance(value, int):
            raise QuantPlanError(
                f"config key {key!r} must be true, false, a number or null, found {value!r}"
            )
        return bool(value) != condition.startswith("!")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise QuantPlanError(f"config key {key!r} must be true or false, found {value!r}")
    return value
