"""What a correction costs in bias and buys in variance, exactly: `examples/correction.png`.

    python examples/correction_bias.py [--out examples/correction.png]

A policy over sequences of 5 tokens from 5 words, each word depending on the one before it, is small
enough to enumerate: 3125 sequences. The sampler is that policy with noise on its logits. For every
list of stages, `correct` weighs every sequence, and

    bias = |E[g] - true gradient| / |true gradient|      E over all sequences of the sampler
    error = sqrt(bias^2 + Var[g] / n)                    of a batch of n = 4096 sequences

so nothing here is sampled. The gradient is divided by the kept tokens, as the loss divides it. The
mismatch on the x axis is the k1 estimate of KL per token, which `fp8rl train` logs as
`rollout_corr/kl`: 1e-3 is an FP8 policy with an FP8 KV cache in the demo.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fp8rl.correction import MIS, TIS, Reject, Stage, correct

WORDS, LENGTH, BATCH = 5, 5, 4096
NOISE = torch.logspace(-2, 0.5, 26).tolist()
LISTS: dict[str, Sequence[Stage]] = {
    "no correction": [],
    "TIS of tokens, cap 2": [TIS(cap=2.0)],
    "MIS of tokens, 0.5 to 2": [MIS(low=0.5, high=2.0)],
    "TIS of sequences, cap 2": [TIS(level="sequence", cap=2.0)],
    "geometric rejection 0.9 to 1.1, TIS of tokens": [
        Reject(level="seq_mean", low=0.9, high=1.1),
        TIS(cap=2.0),
    ],
    "TIS of sequences, cap 1e8": [TIS(level="sequence", cap=1e8)],
}
COLOURS = ["#999999", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#000000"]


class Chain:
    """A policy whose every sequence is known, with rewards, and its exact policy gradient."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.generator = g
        self.tokens = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
        start = torch.full_like(self.tokens[:, :1], WORDS)
        self.before = torch.cat([start, self.tokens[:, :-1]], dim=1)  # row WORDS: the start
        self.logits = torch.randn(WORDS + 1, WORDS, generator=g, dtype=torch.float64)
        good = torch.randn(len(self.tokens), generator=g, dtype=torch.float64)
        self.advantages = good - (self.log_probs(self.logits).sum(1).exp() * good).sum()

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of every token of every sequence, [sequences, LENGTH]."""
        return logits.log_softmax(1)[self.before, self.tokens]

    def gradients(self, weights: Tensor) -> Tensor:
        """sum_t w_t A grad log pi(y_t) of every sequence, [sequences, parameters]."""
        scores = torch.eye(WORDS, dtype=torch.float64)[self.tokens]
        scores = scores - self.logits.softmax(1)[self.before]
        weighted = (weights * self.advantages[:, None])[..., None] * scores
        rows = torch.zeros(len(self.tokens), WORDS + 1, WORDS, dtype=torch.float64)
        index = self.before[..., None].expand_as(weighted)
        return rows.scatter_add(1, index, weighted).flatten(1)

    def estimate(self, sampler: Tensor, stages: Sequence[Stage]) -> tuple[float, float]:
        """(bias, error) of the corrected gradient, as shares of the true one's length."""
        truth = self.log_probs(self.logits).sum(1).exp() @ self.gradients(torch.ones(()))
        rollout = self.log_probs(sampler)
        everything = torch.ones_like(rollout, dtype=torch.bool)
        fix = correct(stages, self.log_probs(self.logits), rollout, everything)
        mass = rollout.sum(1).exp()
        kept_share = mass @ fix.kept.double().mean(1)
        each = self.gradients(fix.weights.double()) / kept_share
        mean = mass @ each
        variance = mass @ (each - mean).square().sum(1)
        bias = (mean - truth).norm() / truth.norm()
        error = (bias.square() + variance / BATCH / truth.norm() ** 2).sqrt()
        return bias.item(), error.item()


def measure() -> tuple[list[float], dict[str, tuple[list[float], list[float]]]]:
    """Mismatches, and for each list of stages its biases and errors."""
    chain = Chain()
    noise = torch.randn(chain.logits.shape, generator=chain.generator, dtype=torch.float64)
    mismatch: list[float] = []
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in LISTS}
    for scale in NOISE:
        sampler = chain.logits + scale * noise
        rollout, train = chain.log_probs(sampler), chain.log_probs(chain.logits)
        mismatch.append(float(rollout.sum(1).exp() @ (rollout - train).mean(1)))
        for name, stages in LISTS.items():
            bias, error = chain.estimate(sampler, stages)
            found[name][0].append(bias)
            found[name][1].append(error)
    return mismatch, found


def draw(path: Path) -> None:
    """The picture: bias on the left, the error of a batch on the right."""
    from fp8rl.plots import STYLE

    mismatch, found = measure()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        figure.suptitle(
            f"Policy gradient under a mismatched sampler: {WORDS**LENGTH} sequences, exact",
            fontweight="bold",
        )
        panels = figure.subplots(1, 2, sharey=True)
        titles = ("bias", f"error of a batch of {BATCH} sequences: bias and noise")
        for axes, title, which in zip(panels, titles, (0, 1), strict=True):
            for (name, values), colour in zip(found.items(), COLOURS, strict=True):
                axes.plot(mismatch, values[which], color=colour, label=name)
            axes.set(xscale="log", yscale="log", ylim=(1e-4, 3))
            axes.set_title(title, loc="left")
            axes.set_xlabel("mismatch: KL of a token, nats")
        panels[0].set_ylabel("share of the true gradient's length")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("examples/correction.png"))
    arguments = parser.parse_args()
    draw(arguments.out)
    print(arguments.out)
