"""A run whose responses are cut in segments: the real engine, the real trainer, killed and resumed.

The tiny run's responses have three tokens at most, so that with two to a segment some of them begin
under one version of the weights and end under the next.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fp8rl import loop
from fp8rl.config.file import load_config
from fp8rl.engine.rollout import RolloutEngine, Sample, Segment
from fp8rl.rollout_batch import RolloutBatch
from fp8rl.segments import SEED_STEP, Group, SegmentPool, first_seed
from tests.fp8rl.run_helpers import TINY, Command, metrics, numbers, write_config

pytestmark = pytest.mark.slow  # real engines

CUT = 2
CUT_RUN = [f"rollout.segment_tokens={CUT}", "steps=10"]
SAMPLES = TINY["rollout"]["samples_per_prompt"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("cut"))


@dataclass
class Seen:
    """What a run did, step by step."""

    wrote: dict[int, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    taken: list[list[Group]] = field(default_factory=list)
    batches: list[RolloutBatch] = field(default_factory=list)
    scored: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(config: Path) -> Seen:
    """A run in this process, overheard: ``wrote`` has what the engine said of each response."""
    seen = Seen()
    ask = RolloutEngine.extend

    def extend(self: RolloutEngine, segments: list[Segment], **named: Any) -> list[Sample]:
        answers = ask(self, segments, **named)
        for segment, answer in zip(segments, answers, strict=True):
            seen.wrote[response(segment.seed)].append(answer)
        return answers

    def overheard(do: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
        def done(*arguments: Any, **named: Any) -> Any:
            kept.append(do(*arguments, **named))
            return kept[-1]

        return done

    folder = f"run_dir={config.parent / 'seen'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "extend", extend)
        patch.setattr(SegmentPool, "take", overheard(SegmentPool.take, seen.taken))
        patch.setattr(loop, "sample", overheard(loop.sample, seen.batches))
        patch.setattr(loop, "score", overheard(loop.score, seen.scored))
        loop.train(load_config(config, [folder, *CUT_RUN]), resume=False, command="")
    return seen


def response(seed: int) -> int:
    """Which of the run's responses a segment with that seed belongs to."""
    return (seed - first_seed(TINY["seed"])) % SEED_STEP


def test_the_batchs_versions_and_logprobs_are_what_the_engine_said_of_each_token(
    seen: Seen,
) -> None:
    spans = 0
    for groups, batch in zip(seen.taken, seen.batches, strict=True):
        numbers = [SAMPLES * group.draw + index for group in groups for index in range(SAMPLES)]
        for row, number in enumerate(numbers):
            mask, parts = batch.batch.response_mask[row], seen.wrote[number]
            told = {
                field: [x for part in parts for x in getattr(part, field)]
                for field in ("tokens", "logprobs", "versions")
            }
            assert batch.batch.tokens[row][mask].tolist() == told["tokens"]
            assert batch.versions[row][mask].tolist() == told["versions"]
            torch.testing.assert_close(batch.logprobs[row][mask], torch.tensor(told["logprobs"]))
            assert [len(part.tokens) for part in parts[:-1]] == [CUT] * (len(parts) - 1)
            spans += len(set(told["versions"])) > 1
    assert spans >= 10


def test_the_trainer_agrees_with_the_tokens_of_its_version_and_less_with_older_ones(
    seen: Seen,
) -> None:
    off: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for version, (batch, scored) in enumerate(zip(seen.batches, seen.scored, strict=True)):
        ages, mask = batch.ages(version), batch.batch.response_mask
        for old in off:
            chosen = mask & ((ages > 0) == old)
            off[old].append((scored - batch.logprobs)[chosen].abs())
    fresh, aged = (torch.cat(off[old]) for old in (False, True))
    assert len(aged) >= 20
    assert aged.mean() > 3 * fresh.mean()


@pytest.fixture(scope="module")
def unbroken(config: Path, seen: Seen) -> Path:
    """The folder of the run that was overheard, and otherwise left alone."""
    return config.parent / "seen"


def test_its_metrics_say_what_was_cut(seen: Seen, unbroken: Path) -> None:
    lines = metrics(unbroken)[:-1]
    assert len(lines) == len(seen.batches) == 10
    for version, (line, batch) in enumerate(zip(lines, seen.batches, strict=True)):
        ages = batch.ages(version)[batch.batch.response_mask]
        assert line["rollout/max_age"] == int(ages.max()) <= 2
        assert line["rollout/mean_age"] == pytest.approx(float(ages.double().mean()))
        assert line["rollout/segments"] >= 1
    assert any(line["rollout/unfinished"] > 0 for line in lines)
    made = sum(line["rollout/tokens"] for line in lines)
    assert made == sum(len(part.tokens) for parts in seen.wrote.values() for part in parts)


@pytest.mark.long
def test_killed_in_a_step_and_resumed_it_ends_bit_for_bit_like_the_unbroken_run(
    config: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = Command(folder, config, f"run_dir={folder}", *CUT_RUN)
    command.wait_for_a_step(after=4)  # version 3 is saved, and a step has begun
    command.send(signal.SIGKILL)
    end = command.end()
    assert end.code == -signal.SIGKILL
    [*_, saved] = end.checkpoints
    held = load_file(folder / "checkpoints" / f"step-{saved:08d}" / "rank-0.safetensors")
    assert len(held["pool/draws"]) > 0, "there are unfinished groups to be lost"
    end = Command(folder, "--resume", folder).end()
    assert (end.code, end.errors) == (0, "")
    for hurt, untouched in zip(numbers(folder), numbers(unbroken), strict=True):
        assert hurt == untouched
