"""`fp8rl bench rollout`: what FP8 weights and an FP8 KV cache do for the speed of generating.

    goals   on a CPU, 0.25 to 0.7 B weights: FP8 weights at least 1.25 times BF16's output tokens a
            second up to 8 responses at once, and at least as many with 32
            capacity: an FP8 cache holds twice the tokens in the same bytes

In each round every arm is a fresh engine (``rollout_arms.py``). At each point (batch size, length
of the responses, with a weight update or without) all arms get the same prompts, one after the
other, in an order drawn anew; ratios are taken within a round. Engines that wait compute nothing.
Where memory does not hold all of them at once, or on a GPU, an arm goes through all points before
the next one is started.

A round is written to ``rounds.jsonl`` when it is done, and a bench that was stopped goes on behind
the last one. Other work on the machine slows arms at random: each round keeps the share of the
cores that the engine got (``cores``).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fp8rl.bench.result import BenchResult, device_name
from fp8rl.bench.rollout_arms import ARMS, BF16, Arm, ArmSettings, Point, Round, Turn
from fp8rl.bench.rollout_figures import SMALL_BATCH, ratios_of, rows_of
from fp8rl.bench.rollout_model import Subject, fitted, fitted_to_device, host_bytes
from fp8rl.errors import ConfigError
from fp8rl.sync import IterableSource

ROUNDS = "rounds.jsonl"
BLOCK_TOKENS = 128  # of a block of vLLM's cache on a CPU


@dataclass(frozen=True)
class Workload:
    """What is asked of every arm.

    batches: responses at once, each of ``tokens`` tokens. lengths: of responses, ``length_batch``
    at once. update_every: rollouts of the largest batch after each weight update; 0 leaves updates
    out. prompt: tokens of each prompt.
    """

    batches: tuple[int, ...]
    tokens: int
    lengths: tuple[int, ...]
    prompt: int
    update_every: int

    @property
    def length_batch(self) -> int:
        """The batch size at which lengths are compared: 8, or the largest below."""
        return max((b for b in self.batches if b <= SMALL_BATCH), default=min(self.batches))

    def points(self) -> list[Point]:
        """All of them, each once."""
        points = [Point(batch, self.tokens) for batch in self.batches]
        points += [Point(self.length_batch, tokens) for tokens in self.lengths]
        if self.update_every:
            points.append(Point(max(self.batches), self.tokens, self.update_every))
        return list(dict.fromkeys(points))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, its prompt among them, in whole blocks."""
        return BLOCK_TOKENS * _blocks(self.prompt + max(self.tokens, *self.lengths, 0))

    def cached_tokens(self) -> int:
        """Tokens that a cache must hold for the largest point, in whole blocks and one to spare."""
        needed = (point.batch * _blocks(self.prompt + point.tokens) for point in self.points())
        return BLOCK_TOKENS * (1 + max(needed))

    def prompts(self, point: Point, round_number: int, vocabulary: int) -> list[list[list[int]]]:
        """Prompts of each rollout of a point: random tokens that no other turn has seen."""
        drawn = random.Random(f"{round_number} {point}")
        return [
            [[drawn.randrange(vocabulary) for _ in range(self.prompt)] for _ in range(point.batch)]
            for _ in range(max(1, point.update_every))
        ]


@dataclass(frozen=True)
class Engines:
    """How engines are started: their device, and the memory of the KV cache.

    kv_bytes: on a CPU; None as the largest point needs in BF16. gpu_memory: on CUDA, the share of
    the GPU's memory that an engine takes.
    """

    cuda: bool
    kv_bytes: int | None = None
    gpu_memory: float = 0.9


class Bench:
    """One model, its arms and what is asked of them."""

    def __init__(
        self, subject: Subject, arms: Sequence[str], workload: Workload, engines: Engines
    ) -> None:
        """Cut the model until it fits.

        Raises:
            ConfigError: it does not fit at all, or bf16 is not among the arms.
        """
        if BF16 not in arms:
            raise ConfigError("bf16 must be among the arms: the others are compared with it")
        self.arms, self.workload, self._engines = list(arms), workload, engines
        cuda, available = engines.cuda, psutil.virtual_memory().available
        if cuda:
            subject = fitted_to_device(subject, torch.cuda.get_device_properties(0).total_memory)
        self.subject = fitted(subject, lambda s: self._settings(BF16, s), available, cuda=cuda)
        needed = host_bytes(self.subject, [self.settings(arm) for arm in arms], cuda=cuda)
        self._together = not cuda and needed <= available

    def settings(self, arm: str) -> ArmSettings:
        """What an arm's engine is started with."""
        return self._settings(arm, self.subject)

    def _settings(self, arm: str, subject: Subject) -> ArmSettings:
        precision, activations = ARMS[arm]
        needed = self.workload.cached_tokens() * subject.kv_bytes_per_token()
        return ArmSettings(
            subject.config,
            precision,
            max_model_len=self.workload.longest,
            max_num_seqs=max(self.workload.batches),
            kv_cache_bytes=self._engines.kv_bytes or needed,
            activations=activations,
            gpu_memory=self._engines.gpu_memory if self._engines.cuda else None,
        )

    def described(self) -> dict[str, Any]:
        """What result.json says of it; rounds of another one are not gone on with."""
        return {
            "model": self.subject.described(),
            "weights": self.subject.weights(),
            "layers": self.subject.layers,
            "all_layers": self.subject.all_layers,
            "arms": self.arms,
            **asdict(self.workload),
            "length_batch": self.workload.length_batch,
            "cuda": self._engines.cuda,
            "kv_bytes": None if self._engines.cuda else self.settings(BF16).kv_cache_bytes,
            "gpu_memory": self._engines.gpu_memory if self._engines.cuda else None,
            "weight_bytes": {
                arm: self.subject.engine_bytes(self.settings(arm)) for arm in self.arms
            },
        }

    def round(
        self,
        number: int,
        source: IterableSource,
        folder: Path,
        doing: Callable[[str], None] = lambda _: None,
        done: Callable[[], None] = lambda: None,
    ) -> Round:
        """Start the arms, take them through all points, and close them."""
        load = os.getloadavg()[0]
        order = random.Random(number)
        shuffled = order.sample(self.arms, len(self.arms))
        found: list[Turn] = []
        memory: dict[str, dict[str, int | None]] = {}
        for group in [shuffled] if self._together else [[arm] for arm in shuffled]:
            with ExitStack() as stack:
                doing(f"round {number}: {', '.join(group)} start{'s' if len(group) == 1 else ''}")
                arms = [Arm(arm, self.settings(arm), source, folder / arm, stack) for arm in group]
                self._open(arms)
                for point in self.workload.points():
                    prompts = self.workload.prompts(point, number, self.subject.vocabulary)
                    for arm in order.sample(arms, len(arms)):
                        doing(f"round {number}: {arm.name}, {point.batch} x {point.tokens} tokens")
                        found.append(arm.turn(point, prompts, number))
                        done()
                memory |= {arm.name: arm.memory() for arm in arms}
        return Round(found, memory, load)

    def _open(self, arms: Sequence[Arm]) -> None:
        largest = Point(max(self.workload.batches), self.workload.tokens)
        [prompts] = self.workload.prompts(largest, 0, self.subject.vocabulary)
        for arm in arms:
            arm.engine.wait_ready()
        for arm in arms:
            arm.open(prompts, [point.batch for point in self.workload.points()])


def bench_rollout(
    bench: Bench,
    rounds: int,
    folder: Path,
    doing: Callable[[str], None] = lambda _: None,
    done: Callable[[], None] = lambda: None,
) -> BenchResult:
    """Measure all rounds that ``folder`` does not have yet.

    Args:
        bench: what is measured.
        rounds: in all.
        folder: gets rounds.jsonl and the engines' logs.
        doing: hears what begins. done: hears when a turn has ended, those of before included.

    Raises:
        ConfigError: the folder has rounds of another bench. EngineError: an engine failed.
    """
    described = bench.described()
    known = saved_rounds(folder / ROUNDS, described)
    for _ in range(min(len(known), rounds) * len(bench.arms) * len(bench.workload.points())):
        done()
    if len(known) < rounds:
        doing("weights")
        source = bench.subject.source()
    for number in range(len(known) + 1, rounds + 1):
        known.append(bench.round(number, source, folder, doing, done))
        with (folder / ROUNDS).open("a") as file:
            file.write(json.dumps(known[-1].to_json()) + "\n")
    known = known[:rounds]
    settings = described | {"rounds": rounds, "load": [round_.load for round_ in known]}
    device = torch.device("cuda" if described["cuda"] else "cpu")
    rows, ratios = rows_of(known, described), ratios_of(known, described)
    return BenchResult("rollout", settings, ratios, rows, device_name(device))


def saved_rounds(path: Path, described: Mapping[str, Any]) -> list[Round]:
    """The whole rounds of a file, which is begun where there is none.

    Raises ConfigError where they are of another bench.
    """
    head = json.dumps(dict(described))
    if not path.exists():
        path.write_text(head + "\n")
        return []
    lines = path.read_text().splitlines(keepends=True)
    if not lines or lines[0] != head + "\n":
        raise ConfigError(
            f"{path} has rounds of another model, of other arms or of other points (or the model "
            "was cut to other layers): repeat the command that made it, or choose another --out"
        )
    whole = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(whole))  # without what a kill left half written
    return [Round.from_json(json.loads(line)) for line in whole[1:]]


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
