"""Run in a process of its own: a trainer that has vLLM's ``LLM`` within itself.

Usage: python -m tests.sync.in_process_worker FOLDER. Prints one JSON object: what was seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests import helpers

PROMPT = [2 + i % 60 for i in range(40)]


def main(folder: Path) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from fp8rl.sync import InProcessEngine, Publisher
    from fp8rl.sync.worker_extension import EXTENSION

    settings = helpers.settings()
    arguments: dict[str, Any] = {
        **settings.llm_arguments(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "weight_transfer_config": {"backend": "fp8rl"},
    }
    llm = LLM(**arguments, worker_extension_cls=EXTENSION)
    engine = InProcessEngine(llm)
    plan, layers = settings.plan(), helpers.LAYERS

    def answer() -> list[int]:
        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    seen: dict[str, Any] = {"at first": engine.failure}
    with Publisher(plan, engine, kv_layers=layers, deltas=True) as publisher:

        def publish(seed: int, version: int) -> str:
            scales = helpers.scales(version)
            report = publisher.publish(helpers.source(seed), version=version, kv_scales=scales)
            assert report is not None
            return report.kind

        seen["kinds"] = [publish(1, 1)]
        seen["served"] = [engine.failure, llm.get_weight_version()]
        first = answer()
        seen["kinds"].append(publish(2, 2))
        second = answer()
        try:
            publisher.publish(helpers.source(3), version=3, kv_scales=lambda: helpers.scales(1))
        except ValueError as error:
            seen["refused"] = f"{type(error).__name__}: {error}"
        seen["after the refusal"] = [engine.failure, answer() == second]
        seen["kinds"].append(publish(1, 4))
        seen["answers"] = [answer() == first, first != second]
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
