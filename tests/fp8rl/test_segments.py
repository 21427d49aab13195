"""The pool of unfinished groups, against an engine whose policy is a table that can be enumerated.

A prompt is its draw's number; an answer is made of two letters and STOP, each token depending on
the one before it and on the seed of its segment alone. ``POLICIES`` follow one another as versions.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8rl.config.file import parse_config
from fp8rl.config.run import TaskConfig
from fp8rl.correction import TIS, correct
from fp8rl.engine.rollout import Sample, Segment
from fp8rl.errors import EngineError, StaleWeightsError
from fp8rl.segments import SEED_STEP, Bounds, Group, SegmentPool, first_seed
from fp8rl.session import segment_pool
from fp8rl.task import DigitTask

STOP, LETTERS, PROMPT = 1, (2, 3), 100  # token ids; prompts are PROMPT + draw


def make_policies() -> list[list[list[float]]]:
    """Probabilities [version][token before: STOP's row is the start][STOP or letter]."""
    g = torch.Generator().manual_seed(2)
    logits = 0.5 * torch.randn(12, 3, 3, generator=g, dtype=torch.float64)
    policies: list[list[list[float]]] = logits.softmax(-1).tolist()
    return policies


POLICIES = make_policies()


def engine(segments: list[Segment], version: int) -> list[Sample]:
    """Go on with each segment by the table of ``version``."""
    return [go_on(segment, version) for segment in segments]


def go_on(segment: Segment, version: int) -> Sample:
    draws = torch.Generator().manual_seed(segment.seed)
    noise = torch.rand(segment.max_tokens, generator=draws, dtype=torch.float64).tolist()
    tokens: list[int] = []
    logprobs = []
    before = segment.tokens[-1]
    for number in noise:
        chances = POLICIES[version % len(POLICIES)][row(before)]
        index = min(sum(number > bound for bound in itertools.accumulate(chances)), 2)
        before = STOP + index
        tokens.append(before)
        logprobs.append(math.log(chances[index]))
        if before == STOP:
            break
    return Sample(tuple(tokens), tuple(logprobs), (version,) * len(tokens))


def row(before: int) -> int:
    return 0 if before >= PROMPT else before - STOP


def make_pool(
    groups: int = 3, samples: int = 2, segment_tokens: int = 2, max_tokens: int = 6, seed: int = 0
) -> SegmentPool:
    bounds = Bounds(groups, samples, segment_tokens, max_tokens, STOP, seed)
    return SegmentPool(bounds, lambda draw: (PROMPT + draw,))


def take(pool: SegmentPool, version: int) -> list[Group]:
    return pool.take(functools.partial(engine, version=version), version)


def samples_in(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


shapes = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 4),
        "samples": st.integers(1, 3),
        "segment_tokens": st.integers(1, 5),
        "max_tokens": st.integers(1, 9),
        "seed": st.integers(0, 3).map(first_seed),
    }
)


@given(shape=shapes)
@settings(deadline=None, max_examples=60)
def test_each_step_trains_on_whole_groups_and_no_group_is_dropped(shape: dict[str, int]) -> None:
    pool, trained = make_pool(**shape), list[int]()
    for version in range(len(POLICIES)):
        batch = take(pool, version)
        draws = [group.draw for group in batch]
        assert len(batch) == shape["groups"]
        assert draws == sorted(draws)
        for group in batch:
            assert group.prompt == (PROMPT + group.draw,)
            assert len(group.samples) == shape["samples"]
        for sample in samples_in(batch):
            assert sample.tokens.count(STOP) == (sample.tokens[-1] == STOP)
            assert sample.tokens[-1] == STOP or len(sample.tokens) == shape["max_tokens"]
        trained += draws
        held = pool.state()["pool/draws"].tolist()
        assert len(held) < shape["groups"]
        assert sorted(trained + held) == list(range(len(trained) + len(held)))


@given(shape=shapes)
@settings(deadline=None, max_examples=60)
def test_versions_grow_within_a_sample_and_ages_are_bounded(shape: dict[str, int]) -> None:
    pool = make_pool(**shape)
    oldest = -(-shape["max_tokens"] // shape["segment_tokens"])
    for version in range(len(POLICIES)):
        for sample in samples_in(take(pool, version)):
            assert list(sample.versions) == sorted(sample.versions)
            assert version - oldest <= sample.versions[0] <= sample.versions[-1] <= version
            for number, place in enumerate(range(0, len(sample.tokens), shape["segment_tokens"])):
                segment = sample.versions[place : place + shape["segment_tokens"]]
                assert len(set(segment)) == 1, f"segment {number}"


@given(shape=shapes, stop_after=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_a_pool_restored_from_a_file_goes_on_as_the_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, int], stop_after: int
) -> None:
    unbroken = make_pool(**shape)
    for version in range(stop_after):
        take(unbroken, version)
    path = tmp_path_factory.mktemp("pool") / "pool.safetensors"
    save_file(unbroken.state(), path)
    restored = make_pool(**shape)
    restored.load_state(load_file(path))
    for version in range(stop_after, stop_after + 4):
        assert take(restored, version) == take(unbroken, version)
        assert (restored.calls, restored.tokens) == (unbroken.calls, unbroken.tokens)


def test_segments_as_long_as_the_longest_response_leave_nothing_over() -> None:
    pool = make_pool(segment_tokens=6)
    for version in range(6):
        batch = take(pool, version)
        assert [group.draw for group in batch] == list(range(3 * version, 3 * version + 3))
        assert {v for sample in samples_in(batch) for v in sample.versions} == {version}
        assert (pool.calls, pool.unfinished) == (1, 0)
        assert pool.tokens == sum(len(sample.tokens) for sample in samples_in(batch))


def test_short_segments_carry_samples_over_and_count_calls_and_tokens() -> None:
    pool, calls, trained = make_pool(groups=4, segment_tokens=1), list[int](), 0
    made = 0
    for version in range(12):
        batch = take(pool, version)
        trained += sum(len(sample.tokens) for sample in samples_in(batch))
        made += pool.tokens
        calls.append(pool.calls)
        assert made == trained + len(pool.state()["pool/tokens"])
    assert max(calls) > 1
    ages = [12 - 1 - v for sample in samples_in(batch) for v in sample.versions]
    assert max(ages) >= 1


def test_a_response_does_not_depend_on_how_others_fare() -> None:
    """Seen by tokens; under one policy, since which version answers does depend on the others."""

    def one_policy(segments: list[Segment], others_stop: bool, version: int) -> list[Sample]:
        found = []
        for segment in segments:
            odd = segment.tokens[0] % 2
            stopped = Sample((STOP,), (0.0,), (version,))
            sample = go_on(segment, 0)
            own = Sample(sample.tokens, sample.logprobs, (version,) * len(sample.tokens))
            found.append(stopped if odd and others_stop else own)
        return found

    seen = []
    for others_stop in (False, True):
        pool, even = make_pool(groups=4), dict[int, list[Sample]]()
        for version in range(8):
            generate = functools.partial(one_policy, others_stop=others_stop, version=version)
            for group in pool.take(generate, version):
                if group.draw % 2 == 0:
                    even[group.draw] = group.samples
        seen.append({draw: [s.tokens for s in even[draw]] for draw in range(0, 24, 2)})
    assert seen[0] == seen[1]


def test_no_two_segments_of_a_run_share_a_seed_in_the_bits_that_the_generator_reads() -> None:
    seeds: list[int] = []

    def recording(segments: list[Segment], version: int) -> list[Sample]:
        seeds.extend(segment.seed for segment in segments)
        return engine(segments, version)

    pool = make_pool(groups=32, samples=8, segment_tokens=1, max_tokens=12, seed=first_seed(7))
    for version in range(12):
        pool.take(functools.partial(recording, version=version), version)
    assert len(seeds) > 5000
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert max(seeds) < 2**63


def test_runs_of_different_seeds_share_no_sampling_noise() -> None:
    """100 steps of 512 responses in up to 8 segments each: no seed in two of 8 runs."""
    rows = torch.arange(100 * 512)
    runs = [first_seed(run) + rows + k * SEED_STEP for run in range(8) for k in range(8)]
    read = torch.cat(runs) % 2**32
    assert len(read.unique()) == len(read)
    assert first_seed(0) == 0 and first_seed(2**40 + 1) < 2**32


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            Sample((2, 3), (-1.0, -1.0), (4, 5)),
            StaleWeightsError,
            r"prompt 0 of the run comes from versions \[4, 5\], expected 5",
        ),
        (
            Sample((2,), (-1.0,), (5,)),
            EngineError,
            r"has 1 tokens, the last \(2,\); expected 2, or fewer",
        ),
        (Sample((), (), ()), EngineError, "has 0 tokens, the last"),
        (Sample((STOP, 2), (-1.0,) * 2, (5,) * 2), EngineError, "the last alone is token"),
        (Sample((2, 3), (-1.0,), (5,) * 2), EngineError, "2 tokens, 1 log-probs and 2 versions"),
        (Sample((2, 3, 1), (-1.0,) * 3, (5,) * 3), EngineError, "has 3 tokens"),
    ],
)
def test_a_segment_that_is_not_what_was_asked_for_is_refused(
    answer: Sample, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_pool().take(lambda segments: [answer] * len(segments), 5)


@pytest.mark.parametrize("segment_tokens", [None, 1, 2, 100])
def test_a_run_meets_the_same_prompts_and_first_seeds_however_it_is_cut(
    segment_tokens: int | None,
) -> None:
    rollout = {"prompts_per_step": 4, "samples_per_prompt": 2, "segment_tokens": segment_tokens}
    config = parse_config({"seed": 9, "rollout": rollout, "trainer": {"minibatches": 1}})
    task = DigitTask(TaskConfig(heldout_prompts=8), seed=9)
    asked: list[Segment] = []

    def first_only(segments: list[Segment], version: int) -> list[Sample]:
        asked.extend(segment for segment in segments if segment.tokens[-1] != STOP)
        return [Sample((STOP,), (-1.0,), (version,)) for _ in segments]

    pool = segment_pool(config, task)
    for version in range(3):
        pool.take(functools.partial(first_only, version=version), version)
    prompts = [prompt for step in range(3) for prompt in task.train_prompts(step, 4)]
    assert [segment.tokens for segment in asked] == [prompt for prompt in prompts for _ in "ab"]
    assert [segment.seed for segment in asked] == [first_seed(9) + row for row in range(24)]


# What follows holds the whole way against an exact policy gradient: responses cut at every token,
# written under policies that change with every step, kept until their groups have ended.

LENGTH, STEPS, GROUPS = 5, 60, 100
CURRENT = torch.tensor(POLICIES[0], dtype=torch.float64).log()


def tensors(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (0 is STOP), log-probs and mask, all [samples, LENGTH]."""
    tokens = torch.zeros(len(samples), LENGTH, dtype=torch.int64)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for index, sample in enumerate(samples):
        size = len(sample.tokens)
        tokens[index, :size] = torch.tensor(sample.tokens) - STOP
        logprobs[index, :size] = torch.tensor(sample.logprobs, dtype=torch.float64)
        mask[index, :size] = True
    return tokens, logprobs, mask


def before(tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)


def rewards(tokens: Tensor) -> Tensor:
    """Something that long answers and their last letters earn."""
    return (tokens * torch.tensor([1.0, -2.0, 1.5, 0.5, 4.0], dtype=torch.float64)).sum(1)


def scores(tokens: Tensor, mask: Tensor) -> Tensor:
    """The gradient of each response's log-probability by the current logits, [samples, 9]."""
    hit = torch.nn.functional.one_hot(tokens, 3) - CURRENT.exp()[before(tokens)]
    place = torch.nn.functional.one_hot(before(tokens), 3).double()
    return torch.einsum("bt,btc,btk->bck", mask.double(), place, hit).flatten(1)


def exact() -> Tensor:
    every = []
    for size in range(1, LENGTH + 1):
        for letters in itertools.product(LETTERS, repeat=size - 1):
            ends = (STOP, *LETTERS) if size == LENGTH else (STOP,)
            every += [Sample((*letters, end), (0.0,) * size, ()) for end in ends]
    tokens, _, mask = tensors(every)
    mass = (CURRENT[before(tokens), tokens] * mask).sum(1).exp()
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0, dtype=torch.float64))
    return (mass * rewards(tokens)) @ scores(tokens, mask)


def corrected(samples: list[Sample]) -> Tensor:
    """Each response's estimate of the gradient at the current policy, [samples, 9]."""
    tokens, rollout, mask = tensors(samples)
    current = CURRENT[before(tokens), tokens]
    weights = correct((TIS(level="sequence", cap=1e6),), current, rollout, mask).weights[:, :1]
    return weights * rewards(tokens)[:, None] * scores(tokens, mask)


@functools.cache
def written() -> tuple[Group, ...]:
    """The groups of a run's first prompts, without gaps: all of them have been trained on."""
    pool = make_pool(GROUPS, 2, segment_tokens=1, max_tokens=LENGTH)
    groups = [group for version in range(STEPS + LENGTH) for group in take(pool, version)]
    groups.sort(key=lambda group: group.draw)
    assert [group.draw for group in groups[: STEPS * GROUPS]] == list(range(STEPS * GROUPS))
    return tuple(groups[: STEPS * GROUPS])


def standard_errors(samples: list[Sample]) -> float:
    """How far the mean estimate is from the exact gradient, in standard errors."""
    each = corrected(samples)
    error = each.std(0) / len(each) ** 0.5
    return float(((each.mean(0) - exact()).abs() / error.clamp(min=1e-12)).max())


def versions_in(samples: list[Sample]) -> int:
    """How many versions of the policy wrote these."""
    return len({version for sample in samples for version in sample.versions})


def test_what_the_pool_wrote_under_several_policies_gives_the_exact_gradient() -> None:
    samples = samples_in(list(written()))
    assert sum(versions_in([sample]) > 1 for sample in samples) > 0.3 * len(samples)
    assert standard_errors(samples) < 4


def test_it_would_not_if_groups_that_outlive_a_step_were_dropped() -> None:
    within = [group for group in written() if versions_in(group.samples) == 1]
    assert standard_errors(samples_in(within)) > 20
