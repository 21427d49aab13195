"""What is counted while a batch is corrected, so that every metric follows without a second pass.

Sums and maxima of named quantities, on the batch's device. Two batches' statistics add, over
micro-batches with `+` and over ranks with `reduced`: metrics of the whole follow from them exactly,
each token counting once wherever it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums and maxima by name, fp64 on one device; `names` are those of sums, then of maxima."""

    sum_names: tuple[str, ...]
    max_names: tuple[str, ...]
    sums: Tensor
    maxima: Tensor

    @staticmethod
    def of(sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> Statistics:
        """Gather 0-d tensors of any number type."""
        return Statistics(tuple(sums), tuple(maxima), _gather(sums), _gather(maxima))

    def __add__(self, other: Statistics) -> Statistics:
        """Those of both batches together; both are of the same stages."""
        assert (self.sum_names, self.max_names) == (other.sum_names, other.max_names)
        maxima = torch.maximum(self.maxima, other.maxima)
        return Statistics(self.sum_names, self.max_names, self.sums + other.sums, maxima)

    def sum(self, name: str) -> Tensor:
        """One of the sums, 0-d."""
        return self.sums[self.sum_names.index(name)]

    def maximum(self, name: str) -> Tensor:
        """One of the maxima, 0-d."""
        return self.maxima[self.max_names.index(name)]

    def reduced(self, group: dist.ProcessGroup | None) -> Statistics:
        """Those of all ranks of `group` together; without a group these. Waits for no host."""
        if group is None:
            return self
        sums, maxima = self.sums.clone(), self.maxima.clone()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
        return Statistics(self.sum_names, self.max_names, sums, maxima)

    def replaced(self, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> Statistics:
        """With some of them exchanged."""
        old_sums = {name: self.sums[i] for i, name in enumerate(self.sum_names)}
        old_maxima = {name: self.maxima[i] for i, name in enumerate(self.max_names)}
        return Statistics.of(old_sums | dict(sums), old_maxima | dict(maxima))

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and maxima as numbers; waits for the device once."""
        values = torch.cat([self.sums, self.maxima]).tolist()
        n = len(self.sum_names)
        return (
            dict(zip(self.sum_names, values[:n], strict=True)),
            dict(zip(self.max_names, values[n:], strict=True)),
        )


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sum of at least one."""
    return reduce(Statistics.__add__, parts)


def _gather(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values.values()])
