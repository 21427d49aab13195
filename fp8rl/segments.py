"""Rollouts in segments: a long response is finished over several steps (UloRL, arXiv 2507.19766).

A generation call makes at most ``segment_tokens`` of each response, so that a step does not wait
for its longest one. The pool holds the groups that were begun:

    begin     before each call, prompts are drawn until ``groups`` groups are unfinished
    go on     each unfinished response continues, from its prompt and what it has, under the weights
              of the step; all keys and values are computed anew, for an update drops the cache
    train     calls are made until ``groups`` groups have ended; the oldest of these are taken

Each token keeps the log-prob that it was sampled with, and the version: the loss corrects it by
the policy that wrote it. With segments as long as the longest response one call ends them all, and
a step trains on what it has sampled.

No group is ever dropped, or long answers would be under-represented: each prompt is trained on
once. Those with long answers come later, however: the first steps see more short groups than the
policy writes, and what the pool holds when the run ends, always fewer than ``groups``, is lost. No
token is older than ``ceil(longest response / segment_tokens)`` versions when it is trained on.

Prompts and seeds are functions of (run, draw, sample, segment) alone, whatever becomes of other
responses. All else that the pool knows is in ``state``: a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8rl.engine.rollout import Sample, Segment
from fp8rl.errors import EngineError, StaleWeightsError
from fp8rl.task import TokenIds

# Torch's CPU generator reads the low 32 bits of a seed. These odd steps (the first 2^32 / golden
# ratio) spread the segments of a response and the runs over them, far from each other.
SEED_STEP, RUN_STEP = 0x9E3779B1, 0x85EBCA6B
NOTHING = Sample((), (), ())


def first_seed(run_seed: int) -> int:
    """The seed of a run's first response: in the bits that are read, another for every run."""
    return run_seed * RUN_STEP % 2**32


@dataclass(frozen=True)
class Bounds:
    """What the pool asks for.

    groups: in a step's batch, and unfinished at once. samples: in a group. segment_tokens: that one
    call makes of a response at most. max_tokens: of a whole response. stop_token: ends a response.
    seed: of the run's first response; the others count up from it.
    """

    groups: int
    samples: int
    segment_tokens: int
    max_tokens: int
    stop_token: int
    seed: int


@dataclass
class Group:
    """The responses to one prompt, as far as they are; ``draw`` counts the run's prompts."""

    draw: int
    prompt: TokenIds
    samples: list[Sample]


class SegmentPool:
    """The groups of a run that were begun and not yet trained on, oldest first."""

    def __init__(self, bounds: Bounds, prompt: Callable[[int], TokenIds]) -> None:
        """Begin with an empty pool.

        Args:
            bounds: what to ask for.
            prompt: the run's prompt of each draw, a pure function.
        """
        self._bounds = bounds
        self._prompt = prompt
        self._groups: list[Group] = []
        self._drawn = 0
        self.calls = 0  # to generate, for the batch taken last
        self.tokens = 0  # that they made

    @property
    def unfinished(self) -> int:
        """Responses that have begun and not ended."""
        return len(self._open())

    def take(self, generate: Callable[[list[Segment]], list[Sample]], version: int) -> list[Group]:
        """Generate until ``groups`` groups have ended; remove and return the oldest of these.

        Args:
            generate: samples each segment under weights of ``version``, in their order.
            version: that every new token must come from.

        Raises:
            StaleWeightsError: a token came from another version.
            EngineError: a segment is longer than asked for, or stopped short without an end.
        """
        self.calls = self.tokens = 0
        while len(ended := self._ended()) < self._bounds.groups:
            self._begin()
            self._go_on(generate, version)
        taken = ended[: self._bounds.groups]
        draws = {group.draw for group in taken}
        self._groups = [group for group in self._groups if group.draw not in draws]
        return taken

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step needs, for a checkpoint: flat CPU tensors."""
        samples = [sample for group in self._groups for sample in group.samples]

        def flat(field: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([x for s in samples for x in getattr(s, field)], dtype=dtype)

        return {
            "pool/drawn": torch.tensor([self._drawn]),
            "pool/draws": torch.tensor([group.draw for group in self._groups], dtype=torch.int64),
            "pool/lengths": torch.tensor([len(s.tokens) for s in samples], dtype=torch.int64),
            "pool/tokens": flat("tokens", torch.int64),
            "pool/logprobs": flat("logprobs", torch.float64),  # as they came, exactly
            "pool/versions": flat("versions", torch.int64),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        lengths = state["pool/lengths"].tolist()
        fields = (
            torch.split(state[f"pool/{name}"], lengths)
            for name in ("tokens", "logprobs", "versions")
        )
        samples = [
            Sample(*(tuple(part.tolist()) for part in parts)) for parts in zip(*fields, strict=True)
        ]
        width = self._bounds.samples
        self._drawn = int(state["pool/drawn"])
        self._groups = [
            Group(draw, self._prompt(draw), samples[row * width : (row + 1) * width])
            for row, draw in enumerate(state["pool/draws"].tolist())
        ]

    def _begin(self) -> None:
        """Draw prompts until as many groups are unfinished as may be."""
        unfinished = len(self._groups) - len(self._ended())
        for draw in range(self._drawn, self._drawn + self._bounds.groups - unfinished):
            samples = [NOTHING] * self._bounds.samples
            self._groups.append(Group(draw, self._prompt(draw), samples))
            self._drawn = draw + 1

    def _go_on(self, generate: Callable[[list[Segment]], list[Sample]], version: int) -> None:
        """One generation call, for every response that has not ended."""
        unfinished = self._open()
        segments = [self._segment(group, index) for group, index in unfinished]
        answers = generate(segments)
        for (group, index), segment, new in zip(unfinished, segments, answers, strict=True):
            _check(group, new, segment, self._bounds.stop_token, version)
            old = group.samples[index]
            group.samples[index] = Sample(
                old.tokens + new.tokens, old.logprobs + new.logprobs, old.versions + new.versions
            )
            self.tokens += len(new.tokens)
        self.calls += 1

    def _segment(self, group: Group, index: int) -> Segment:
        """What one response needs next."""
        bounds, so_far = self._bounds, group.samples[index].tokens
        number = len(so_far) // bounds.segment_tokens  # all before it were whole
        first = bounds.seed + group.draw * bounds.samples + index
        return Segment(
            tokens=group.prompt + so_far,
            max_tokens=min(bounds.segment_tokens, bounds.max_tokens - len(so_far)),
            seed=first + number * SEED_STEP,
        )

    def _open(self) -> list[tuple[Group, int]]:
        """Every response that has not ended, as its group and its place there."""
        return [
            (group, index)
            for group in self._groups
            for index, sample in enumerate(group.samples)
            if not self._has_end(sample)
        ]

    def _ended(self) -> list[Group]:
        return [group for group in self._groups if all(map(self._has_end, group.samples))]

    def _has_end(self, sample: Sample) -> bool:
        stopped = sample.tokens[-1:] == (self._bounds.stop_token,)
        return stopped or len(sample.tokens) == self._bounds.max_tokens


def _check(group: Group, new: Sample, segment: Segment, stop_token: int, version: int) -> None:
    """Refuse a segment that is not what was asked for."""
    what = f"a segment of the response to prompt {group.draw} of the run"
    if set(new.versions) - {version}:
        raise StaleWeightsError(
            f"{what} comes from versions {sorted(set(new.versions))}, expected {version}"
        )
    whole = len(new.tokens) == segment.max_tokens or new.tokens[-1:] == (stop_token,)
    if not whole or len(new.tokens) > segment.max_tokens or stop_token in new.tokens[:-1]:
        raise EngineError(
            f"{what} has {len(new.tokens)} tokens, the last {new.tokens[-1:]}; expected "
            f"{segment.max_tokens}, or fewer of which the last alone is token {stop_token}"
        )
    if not len(new.tokens) == len(new.logprobs) == len(new.versions):
        raise EngineError(
            f"{what} has {len(new.tokens)} tokens, {len(new.logprobs)} log-probs and "
            f"{len(new.versions)} versions; expected as many of each"
        )
