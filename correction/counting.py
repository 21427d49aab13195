"""Counting the statistics of a batch while its parts are corrected.

A part gives sums and extremes over its tokens, and a few numbers for each of its sequences, of
which `batch_statistics` makes the rest once for all parts. Elementwise work is in the part's own
dtype, fp32 or wider. Masked positions hold log-probs of 0, so ratios of 1, which are taken out of
the sums again: these, and sums of which a variance is made, are in fp64, for what is wanted is a
small difference of them. Others are in the part's dtype; a part is small, and torch adds pairwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8rl.correction.checks import POSITIVE_TOLERANCE
from fp8rl.correction.layout import Layout
from fp8rl.correction.ratios import bounded_exp, masked, mean_of_tokens
from fp8rl.correction.rejection import TokenLogRatios
from fp8rl.correction.stages import TIS, Weighting
from fp8rl.correction.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Counted:
    """What was counted of some parts.

    Attributes:
        of_tokens: sums and maxima over tokens; masked ones are still in some.
        names: of the numbers of each sequence.
        rows: those, fp64 [names, sequences].
    """

    of_tokens: Statistics
    names: tuple[str, ...]
    rows: Tensor

    def __add__(self, later: Counted) -> Counted:
        """That of both, these sequences first."""
        rows = torch.cat([self.rows, later.rows], dim=1)
        return Counted(self.of_tokens + later.of_tokens, self.names, rows)


class PartStatistics:
    """Gathers what is counted of one part; each method is called once, in this order."""

    def __init__(self, layout: Layout, mask: Tensor) -> None:
        self._layout, self._mask = layout, mask
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def result(self) -> Counted:
        """All of it, in memory of its own."""
        of_tokens = Statistics.of(self._sums, self._maxima)
        return Counted(of_tokens, tuple(self._rows), torch.stack(list(self._rows.values())))

    def policies(self, train: Tensor, rollout: Tensor, lr: TokenLogRatios) -> None:
        """Both policies' log-probs, and whether all of them can be used."""
        self._rows |= {
            "tokens": lr.tokens,
            "log_ratio": lr.sums,
            "train": self._layout.sum(train).double(),
            "rollout": self._layout.sum(rollout).double(),
        }
        unusable = {"train": _unusable(train), "rollout": _unusable(rollout)}
        self._unusable = unusable["train"] | unusable["rollout"]
        self._sums |= {f"unusable_{name}": found for name, found in unusable.items()}
        # of the probabilities: what Pearson's correlation and their difference need
        p, q = (masked(x.exp(), self._mask).flatten().double() for x in (train, rollout))
        self._sums |= {"p": p.sum(), "q": q.sum()}
        self._sums |= {"pp": p.dot(p), "qq": q.dot(q), "pq": p.dot(q)}
        apart = p.sub_(q).abs_()
        self._sums |= {"prob_diff": apart.sum(), "prob_diff_squared": apart.dot(apart)}
        self._maxima["prob_diff"] = apart.amax()

    def tokens(self, lr: TokenLogRatios, ratio: Tensor) -> None:
        """Divergences token by token, of the raw ratios, which are 1 where masked."""
        absolute = lr.value.abs()
        self._maxima["abs_log_ratio"] = absolute.amax()
        self._sums |= {"k3": lr.k3.sum(), "exp_abs": absolute.exp_().double().sum()}
        self._moments("ratio", ratio)

    def rejected(self, name: str, keeps: Tensor) -> None:
        """How much one stage alone rejects."""
        self._rows[f"rejected_{name}"] = self._layout.count(self._mask & ~keeps)

    def poison(self) -> Tensor:
        """0, or NaN if a log-prob of this part cannot be used."""
        return torch.where(self._unusable, torch.nan, 0.0)

    def level_ratios(self, weighting: Weighting | None, ratio: Tensor) -> None:
        """The weighting's ratios before truncation; masked positions: anything."""
        mask = self._mask
        low, high = _bounds(weighting)
        self._sums |= {
            "raw_high": (mask & (ratio > high)).count_nonzero(),
            "raw_low": (mask & (ratio < low)).count_nonzero(),
        }
        self._extremes("raw", ratio, mask)
        if weighting is None or weighting.level == "token":
            names = {"raw": "ratio", "raw_squared": "ratio_squared"}
            self._sums |= {new: self._sums[old] for new, old in names.items()}
        else:
            self._moments("raw", torch.where(mask, ratio, 1.0))

    def weights(self, weights: Tensor, kept: Tensor) -> None:
        """The weights as the loss will take them, 0 where not kept."""
        self._rows["kept"] = self._layout.count(kept)
        self._rows["weight"] = self._layout.sum(weights).double()
        self._moments("weight", weights)
        self._extremes("weight", weights, kept)

    def _moments(self, name: str, x: Tensor) -> None:
        """Sums of `x` and of its square."""
        flat = x.flatten().double()
        self._sums[name] = flat.sum()
        self._sums[f"{name}_squared"] = flat.dot(flat)

    def _extremes(self, name: str, x: Tensor, where: Tensor) -> None:
        """Largest and negated smallest of `x`; -inf where there is none."""
        self._maxima[name] = torch.where(where, x, -torch.inf).amax()
        self._maxima[f"negative_{name}"] = -torch.where(where, x, torch.inf).amin()


def batch_statistics(counted: Counted, positions: int) -> Statistics:
    """The statistics of a batch of so many positions, masked ones included."""
    rows = dict(zip(counted.names, counted.rows, strict=True))
    sums, maxima = _of_sequences(rows)
    positions_masked = positions - sums["tokens"]
    for name in ("exp_abs", "ratio", "ratio_squared", "raw", "raw_squared"):
        sums[name] = counted.of_tokens.sum(name) - positions_masked
    for name, found in rows.items():
        if name.startswith("rejected_"):
            sums[f"{name}_tokens"] = found.sum()
            sums[f"{name}_sequences"] = (found > 0).sum()
    return counted.of_tokens.replaced(sums, maxima)


def _of_sequences(rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What follows from each sequence's numbers; a sequence without tokens adds nothing."""
    tokens, kept = rows["tokens"], rows["kept"]
    exists = tokens > 0
    mean = {name: -mean_of_tokens(rows[name], tokens) for name in ("train", "rollout", "log_ratio")}
    apart = mean["log_ratio"]  # of the log-perplexities
    sums = {
        "tokens": tokens.sum(),
        "sequences": exists.sum(),
        "log_ratio": rows["log_ratio"].sum(),
        "log_ppl_diff": apart.sum(),
        "log_ppl_abs_diff": apart.abs().sum(),
        "ppl_ratio": (bounded_exp(apart) * exists).sum(),
        "squared_sequence_ratio": (bounded_exp(rows["log_ratio"]).square() * exists).sum(),
        "kept": kept.sum(),
        "kept_sequences": (kept > 0).sum(),
        "kept_sequence_weight": mean_of_tokens(rows["weight"], kept).sum(),
        "touched_sequences": (kept < tokens).sum(),
    }
    for name in ("train", "rollout"):
        sums[f"{name}_log_ppl"] = mean[name].sum()
        sums[f"{name}_ppl"] = (bounded_exp(mean[name]) * exists).sum()
    maxima = {
        "log_ppl_diff": torch.where(exists, apart, -torch.inf).amax(),
        "negative_log_ppl_diff": torch.where(exists, -apart, -torch.inf).amax(),
    }
    return sums, maxima


def _unusable(x: Tensor) -> Tensor:
    """Whether one of these log-probs (0 where masked) is NaN, infinite or positive."""
    low, high = x.aminmax()  # NaN if any is
    return ~((low > -torch.inf) & (high <= POSITIVE_TOLERANCE))


def _bounds(weighting: Weighting | None) -> tuple[float, float]:
    """Between which ratios the weighting leaves the ratio as it is; veRL's 1 / cap for TIS."""
    if weighting is None:
        return 0.0, torch.inf
    if isinstance(weighting, TIS):
        return 1 / weighting.cap, weighting.cap
    return weighting.low, weighting.high
