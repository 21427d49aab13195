"""Run in a process of its own: a fresh vLLM engine that loads a checkpoint from disk and samples.

Usage: python -m tests.fp8rl.served_worker CHECKPOINT FOLDER. Reads {"arguments", "prompts",
"sampling", "seeds"} from standard input; prints tokens and log-probs of every sample as JSON.
"""

from __future__ import annotations

import json
import os
import sys


def main(checkpoint: str) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    request = json.loads(sys.stdin.read())
    arguments = request["arguments"] | {"model": checkpoint}
    engine = LLM(skip_tokenizer_init=True, logprobs_mode="processed_logprobs", **arguments)
    parameters = [
        SamplingParams(seed=seed, logprobs=0, detokenize=False, **request["sampling"])
        for seed in request["seeds"]
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    samples = []
    for output in engine.generate(inputs, parameters, use_tqdm=False):
        for completion in output.outputs:
            tokens = list(completion.token_ids)
            steps = zip(completion.logprobs, tokens, strict=True)
            samples.append([tokens, [step[token].logprob for step, token in steps]])
    print(json.dumps(samples))


if __name__ == "__main__":
    main(sys.argv[1])
