"""Counting the statistics of a few sequences while they are corrected.

Elementwise work is in the part's own dtype, fp32 or wider. Sums of which a variance is made are in
fp64, for it is a small difference of them; others in the part's dtype, for a part is small and
torch adds pairwise. Masked positions hold log-probs of 0, so that they add nothing to sums of
log-ratios, and are taken out where they would.
"""

import torch
from torch import Tensor

from fp8rl.correction.checks import POSITIVE_TOLERANCE
from fp8rl.correction.layout import Layout
from fp8rl.correction.ratios import LOG_RATIO_LIMIT, bounded_exp, mean_of_tokens
from fp8rl.correction.rejection import TokenLogRatios
from fp8rl.correction.stages import TIS, Weighting
from fp8rl.correction.statistics import Statistics


class PartStatistics:
    """Gathers the sums and maxima of one part; each method is called once, in this order."""

    def __init__(self, layout: Layout, mask: Tensor) -> None:
        self._layout, self._mask = layout, mask
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def policies(self, train: Tensor, rollout: Tensor, lr: TokenLogRatios) -> None:
        """Both policies' log-probs, per sequence, and whether all of them can be used."""
        self._count = lr.tokens
        exists = lr.tokens > 0
        means = {}
        for name, x in (("train", train), ("rollout", rollout)):
            self._sums[f"unusable_{name}"] = _unusable(x)
            row = -mean_of_tokens(self._layout.sum(x).double(), lr.tokens)
            means[name] = torch.where(exists, row, 0.0)
            self._sums[f"{name}_log_ppl"] = means[name].sum()
            self._sums[f"{name}_ppl"] = (bounded_exp(means[name]) * exists).sum()
        self._sums["unusable"] = self._sums["unusable_train"] | self._sums["unusable_rollout"]
        apart = -mean_of_tokens(lr.sums, lr.tokens)  # 0 for a sequence without tokens
        self._sums |= {
            "tokens": lr.tokens.sum(),
            "sequences": exists.sum(),
            "log_ppl_diff": apart.sum(),
            "log_ppl_abs_diff": apart.abs().sum(),
            "ppl_ratio": (bounded_exp(apart) * exists).sum(),
            "squared_sequence_ratio": (bounded_exp(lr.sums).square() * exists).sum(),
        }
        self._maxima |= {
            "log_ppl_diff": torch.where(exists, apart, -torch.inf).amax(),
            "negative_log_ppl_diff": torch.where(exists, -apart, -torch.inf).amax(),
        }
        self._probabilities(train, rollout)

    def _probabilities(self, train: Tensor, rollout: Tensor) -> None:
        """What Pearson's correlation of the probabilities and their difference need."""
        p, q = (torch.where(self._mask, x.exp(), 0.0).flatten().double() for x in (train, rollout))
        self._sums |= {"p": p.sum(), "q": q.sum()}
        self._sums |= {"pp": p.dot(p), "qq": q.dot(q), "pq": p.dot(q)}
        apart = p.sub_(q).abs_()
        self._sums |= {"prob_diff": apart.sum(), "prob_diff_squared": apart.dot(apart)}
        self._maxima["prob_diff"] = apart.amax()

    def tokens(self, lr: TokenLogRatios, ratio: Tensor) -> None:
        """Divergences token by token, of the raw ratios, which are 1 where masked."""
        flat = ratio.flatten().double()
        absolute = lr.value.abs()
        self._maxima["abs_log_ratio"] = absolute.amax()
        masked_tokens = self._mask.numel() - self._sums["tokens"]
        self._sums |= {
            "log_ratio": lr.sums.sum(),
            "k3": lr.k3.sum(),
            "ratio": flat.sum() - masked_tokens,
            "ratio_squared": flat.dot(flat) - masked_tokens,
            "exp_abs": absolute.exp_().sum() - masked_tokens,
        }

    def rejected(self, name: str, keeps: Tensor) -> None:
        """How much one stage alone rejects."""
        out = self._mask & ~keeps
        self._sums[f"{name}_tokens"] = out.count_nonzero()
        self._sums[f"{name}_sequences"] = (self._layout.count(out) > 0).sum()

    def poison(self) -> Tensor:
        """0, or NaN if a log-prob of this part cannot be used."""
        return torch.where(self._sums["unusable"], torch.nan, 0.0)

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
            self._moments("raw", torch.where(mask, ratio, 0.0))

    def weights(self, weights: Tensor, kept: Tensor) -> None:
        """The weights as the loss will take them, 0 where not kept."""
        layout, kept_tokens = self._layout, self._layout.count(kept)
        row_weight = mean_of_tokens(layout.sum(weights).double(), kept_tokens)
        rejected = self._count - kept_tokens
        self._sums |= {
            "kept": kept_tokens.sum(),
            "kept_sequences": (kept_tokens > 0).sum(),
            "kept_sequence_weight": row_weight.sum(),
            "touched_sequences": (rejected > 0).sum(),
        }
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

    def result(self) -> Statistics:
        """All that was counted."""
        return Statistics.of(self._sums, self._maxima)


def _unusable(x: Tensor) -> Tensor:
    """Whether one of these log-probs (0 where masked) is NaN, infinite or positive."""
    low, high = x.aminmax()  # NaN if any is
    return ~((low > -torch.inf) & (high <= POSITIVE_TOLERANCE))


def _bounds(weighting: Weighting | None) -> tuple[float, float]:
    """Between which ratios the weighting leaves the ratio as it is; veRL's 1 / cap for TIS."""
    if weighting is None:
        return 0.0, bounded_exp(torch.tensor(LOG_RATIO_LIMIT)).item() * 2
    if isinstance(weighting, TIS):
        return 1 / weighting.cap, weighting.cap
    return weighting.low, weighting.high
