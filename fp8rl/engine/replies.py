"""What the engine's process asks of vLLM's workers and outputs, as plain JSON values.

``call_receiver``, ``report`` and ``list_tensors`` run inside a worker, to which vLLM sends them.
"""

from __future__ import annotations

from typing import Any

from fp8rl.sync.manifest import DTYPE_NAMES


def call_receiver(worker: Any, method: str, *arguments: Any) -> Any:
    """Run inside a worker."""
    return getattr(worker.weight_transfer_engine, method)(*arguments)


def report(worker: Any) -> dict[str, Any]:
    """Run inside a worker: what its weight-transfer engine holds, and says of the last call."""
    return dict(worker.weight_transfer_engine.report())


def list_tensors(worker: Any) -> list[Any]:
    """Run inside a worker: name, dtype and shape of each tensor that its model takes."""
    expected = worker.weight_transfer_engine.weights.expected.values()
    return [[t.name, DTYPE_NAMES[t.dtype], list(t.shape)] for t in expected]


def inputs(llm: Any, prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    """Prompts as vLLM takes them.

    Raises ValueError for a token that the model has not: vLLM has no tokenizer here to see it, and
    would end in its forward.
    """
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    for number, prompt in enumerate(prompts):
        if odd := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ValueError(
                f"prompt {number} has token {odd[0]}, and the model's go from 0 to {vocab_size - 1}"
            )
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def sample(completion: Any) -> dict[str, Any]:
    """One vLLM completion as JSON values."""
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)
    ]
    versions = [0] * len(tokens)
    for span in completion.weight_versions:
        for position in range(span.start, span.end):
            versions[position] = int(span.version)
    return {"tokens": tokens, "logprobs": logprobs, "versions": versions}


def prompt_logprobs(output: Any) -> list[float]:
    """The log-prob of each token of a prompt but the first, given those before it."""
    following = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [shown[token].logprob for token, shown in following]
