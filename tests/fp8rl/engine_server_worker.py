"""Run in a process of its own: drive a live engine step by step through updates.

Usage: python -m tests.fp8rl.engine_server_worker FOLDER. Prints one JSON object: case -> what was
seen. The engine's own loop is left out, so that an update lands after a known number of tokens.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import helpers

PROMPTS = [[2 + (i * k) % 60 for i in range(40 + k)] for k in (1, 3, 7, 11)]
TOKENS, BEFORE = 48, 20  # of each answer: all, and those sampled before the update
SAMPLING = {"n": 1, "temperature": 1.0, "max_tokens": TOKENS, "ignore_eos": True}
SEEDS = list(range(len(PROMPTS)))
LONG = [[2 + (i * k) % 60 for i in range(300 + k)] for k in (1, 3, 7, 11)]  # whole cache blocks

Answers = list[dict[str, Any]]


class Bench:
    """A live engine and the way to it."""

    def __init__(self, folder: Path) -> None:
        from fp8rl.engine.server import EngineServer
        from fp8rl.sync.publisher import Publisher

        settings = helpers.settings()
        self.server = EngineServer(settings.llm_arguments(folder))
        self.publisher = Publisher(settings.plan(), self.server, kv_layers=helpers.LAYERS)
        self.version = -1

    def publish(self, seed: int, factor: float = 1.0) -> int:
        self.version += 1
        self.publisher.publish(
            helpers.source(seed),
            version=self.version,
            kv_scales=helpers.scales(self.version, factor),
        )
        return self.version

    def submit(self) -> int:
        return self.server.submit(PROMPTS, self.version, SAMPLING, SEEDS)

    def answers(self, ticket: int) -> Answers:
        while self.server.runs(ticket):
            self.server.step()
        return [group[0] for group in self.server.collect(ticket)]

    def attention(self, do: Callable[[Any], None]) -> None:
        """Do something to the attention of the last layer."""
        self.server._llm.apply_model(lambda model: do(model.model.layers[-1].self_attn.attn))


def main(folder: Path) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    bench = Bench(folder)
    found = {
        "in flight": in_flight(bench),
        "segments": segments(bench),
        "overwritten": overwritten(bench),
        "asleep": asleep(bench),
    }
    bench.publisher.close()
    print(json.dumps(found))


def in_flight(bench: Bench) -> dict[str, Any]:
    """Requests are half answered when other weights and scales arrive."""
    old = bench.publish(seed=0)
    ticket = bench.submit()
    for _ in range(BEFORE):
        bench.server.step()
    new = bench.publish(seed=1, factor=4.0)
    answers = bench.answers(ticket)
    scored = score(bench, answers)
    seen: dict[str, Any] = {
        "old": old,
        "new": new,
        "versions": [answer["versions"] for answer in answers],
        "new tokens under the new weights": k3(answers, scored, new),
        "old tokens under the new weights": k3(answers, scored, old),
    }
    bench.publish(seed=0)
    return seen | {"old tokens under the old weights": k3(answers, score(bench, answers), old)}


def segments(bench: Bench) -> dict[str, Any]:
    """Answers that have ended as segments go on as new requests, after other weights have come."""
    bench.publish(seed=0)
    bounds = [BEFORE, BEFORE + 1, BEFORE + 2, BEFORE + 3]
    first = bench.answers(bench.server.submit(LONG, bench.version, SAMPLING, SEEDS, bounds))
    longer = [prompt + answer["tokens"] for prompt, answer in zip(LONG, first, strict=True)]
    seen: dict[str, Any] = {
        "bounds": bounds,
        "lengths": [len(answer["tokens"]) for answer in first],
        "cached under the same weights": cached(bench, longer),
    }
    new = bench.publish(seed=1, factor=4.0)
    second = bench.answers(bench.server.submit(longer, new, SAMPLING, SEEDS))
    seen |= {
        "versions": [answer["versions"] for answer in second],
        "new": new,
        "new tokens under the new weights": k3(second, score(bench, second, longer), new),
    }
    bench.publish(seed=0)
    return seen | {
        "cached under new weights": cached(bench, longer),
        "new tokens under other weights": k3(second, score(bench, second, longer), new),
    }


def cached(bench: Bench, prompts: list[list[int]]) -> list[int]:
    """How many tokens of each prompt the engine does not compute, for it has them."""
    from vllm import SamplingParams

    once = SamplingParams(max_tokens=1, detokenize=False)
    inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
    outputs = bench.server._llm.generate(inputs, once, use_tqdm=False)
    return [output.num_cached_tokens for output in outputs]


def score(bench: Bench, answers: Answers, prompts: list[list[int]] = PROMPTS) -> list[list[float]]:
    """Log-probs of the answers' tokens, from scratch: prompt and answer as one new prompt."""
    from vllm import SamplingParams

    whole = [prompt + answer["tokens"] for prompt, answer in zip(prompts, answers, strict=True)]
    once = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": tokens} for tokens in whole]
    scored = []
    outputs = bench.server._llm.generate(inputs, once, use_tqdm=False)
    for tokens, output in zip(whole, outputs, strict=True):
        steps = zip(output.prompt_logprobs, tokens, strict=True)
        scored.append([step[token].logprob for step, token in list(steps)[-TOKENS:]])
    return scored


def k3(answers: Answers, scored: list[list[float]], version: int) -> float:
    """KL of sampling from scoring, estimated on the tokens of one version."""
    ratios = [
        there - here
        for answer, row in zip(answers, scored, strict=True)
        for here, there, of in zip(answer["logprobs"], row, answer["versions"], strict=True)
        if of == version
    ]
    return sum(math.expm1(ratio) - ratio for ratio in ratios) / len(ratios)


def overwritten(bench: Bench) -> dict[str, Any]:
    """Somebody else sets a scale of the live model."""
    bench.publish(seed=1)
    bench.attention(lambda attention: attention._k_scale.fill_(1.0))
    seen = {"submit": error_of(bench.submit)}
    bench.publish(seed=1)
    return seen | {"published again": len(bench.answers(bench.submit()))}


def asleep(bench: Bench) -> dict[str, Any]:
    """The scales are lost while the engine sleeps, as older vLLMs lose them."""
    bench.publish(seed=1)
    before, held = bench.answers(bench.submit()), bench.server.kv_state()
    bench.server.sleep(1)
    seen: dict[str, Any] = {"submit": error_of(bench.submit)}
    bench.attention(lambda attention: attention._v_scale.fill_(1.0))
    bench.attention(lambda attention: setattr(attention, "_v_scale_float", 1.0))
    seen["lost"] = bench.server.kv_state() != held
    bench.server.wake_up(["weights"])
    seen["submit half awake"] = error_of(bench.submit)
    bench.server.wake_up(["kv_cache"])
    seen["restored"] = bench.server.kv_state() == held
    return seen | {"same answers": bench.answers(bench.submit()) == before}


def error_of(do: Callable[[], Any]) -> str | None:
    """What ``do`` raises, or None."""
    try:
        do()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
