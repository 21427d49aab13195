"""Run in a process of its own: a real engine, of one or two workers, taken through some steps.

Usage: python -m tests.sync.engine_run_worker JSON, an object of ``family``, ``precision``,
``changes`` (of the config), ``ranks`` and ``steps``. Prints a line ``result:`` with a JSON list of
what each step gave:

    ["tensors"]           for each worker, what it takes
    ["load", seed]        load weights in every worker; for each worker, its differences
    ["break", seed, name] have the loader of one tensor raise; for each worker, whether it did
    ["flip", rank]        change a byte in one worker's kernel; for each worker, its differences
    ["outputs"]           greedy tokens and their log-probs
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.sync import engine_models

TWO_CORES = "0|1"  # one for each worker of a tensor-parallel engine
PROMPTS = [[2 + (5 * i + j) % 60 for j in range(12)] for i in range(3)]
TOKENS = 16
RESULT = "result: "


def tensors(worker: Any) -> list[Any]:
    from fp8rl.sync.engine_state import expected_tensors

    return [[t.name, str(t.dtype), list(t.shape)] for t in expected_tensors(_model(worker))]


def load(worker: Any, job: dict[str, Any], seed: int) -> list[str]:
    from fp8rl.sync.engine_state import differences, load

    sent = engine_models.sent(plan(job), seed)
    load(_model(worker), worker.model_config, sent)
    return differences(_model(worker), sent)


def break_a_load(worker: Any, job: dict[str, Any], seed: int, name: str) -> bool:
    from fp8rl.sync.engine_state import load

    sent = engine_models.sent(plan(job), seed)
    sent[name] = sent[name].to("meta")  # without data: its loader raises
    try:
        load(_model(worker), worker.model_config, sent)
    except NotImplementedError:
        return True
    return False


def flip(worker: Any, job: dict[str, Any], rank: int, seed: int) -> list[str]:
    from fp8rl.sync.engine_state import differences

    linear = _model(worker).model.layers[1].self_attn.qkv_proj
    if worker.rank == rank:
        linear.weight.data.view(torch.uint8)[-1, 7] ^= 1
    return differences(_model(worker), engine_models.sent(plan(job), seed))


def plan(job: dict[str, Any]) -> Any:
    from fp8rl.quant import QuantPlan

    config = engine_models.config(job["family"], **job["changes"])
    return QuantPlan.from_hf_config(config, weights=job["precision"], tensor_parallel=job["ranks"])


def main(job: dict[str, Any]) -> None:
    from vllm import LLM

    from tests.sync import engine_run_worker as remote  # by a name that workers can import

    if job["ranks"] > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = TWO_CORES
    hf_config = engine_models.config(job["family"], **job["changes"])
    with tempfile.TemporaryDirectory() as folder:
        engine_models.write_config(hf_config, plan(job), Path(folder))
        llm = LLM(
            model=folder,
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            tensor_parallel_size=job["ranks"],
            max_model_len=128,
            max_num_seqs=4,
            kv_cache_memory_bytes=64 * 2**20,
            enable_prefix_caching=False,
        )
        given, last = [], 0
        for what, *arguments in job["steps"]:
            if what == "outputs":
                given.append(outputs(llm))
            elif what == "tensors":
                given.append(llm.collective_rpc(remote.tensors))
            elif what == "load":
                last = arguments[0]
                given.append(llm.collective_rpc(remote.load, args=(job, *arguments)))
            elif what == "break":
                given.append(llm.collective_rpc(remote.break_a_load, args=(job, *arguments)))
            else:
                given.append(llm.collective_rpc(remote.flip, args=(job, *arguments, last)))
    print(f"\n{RESULT}{json.dumps(given)}", flush=True)  # vLLM prints while it shuts down


def outputs(llm: Any) -> list[Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    done = llm.generate(prompts, greedy, use_tqdm=False)
    return [
        [[token, step[token].logprob] for token, step in zip(o.token_ids, o.logprobs, strict=True)]
        for o in (request.outputs[0] for request in done)
    ]


def _model(worker: Any) -> Any:
    return worker.model_runner.model


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
