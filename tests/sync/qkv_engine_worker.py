"""Run in a process of its own: watch a live vLLM model, and print what was observed.

Usage: python -m tests.sync.qkv_engine_worker FOLDER. The folder holds a checkpoint (`config.json`,
`model.safetensors`) and `sequences.json`, token ids. Prints one JSON object, case -> observation,
or the error that a mistake was answered with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fp8rl.quant import KVObserver, KVScaleError
from fp8rl.sync import QKVSource

NEW_TOKENS = 3
PADDING_ROWS = 2


def main(folder: Path) -> None:
    from vllm import LLM, SamplingParams

    from fp8rl.sync.qkv_engine import EngineQKV

    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        kv_cache_dtype="fp8",
        kv_cache_memory_bytes=64 * 2**20,
        max_model_len=64,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
    )
    (model,) = llm.apply_model(lambda model: model)
    config = llm.llm_engine.vllm_config
    source = EngineQKV(model, config)
    sequences = json.loads((folder / "sequences.json").read_text())

    def run(prompts: list[list[int]] = sequences, new_tokens: int = 1) -> None:
        options = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)

    def seen(call: Callable[[], None], mask: Any = None) -> Any:
        seer = KVObserver(source.shape, histogram=True)
        try:
            with source.watch(seer) as watch:
                watch.token_mask = mask
                call()
        except KVScaleError as error:
            return str(error)
        return seer.observation().to_json()

    found = {
        "shape": vars(source.shape),
        "is a source": isinstance(source, QKVSource),
        "prompts": seen(run),
        "prompts in turn": seen(lambda: [run([ids]) for ids in sequences]),
        "prompts and new tokens": seen(lambda: run(new_tokens=NEW_TOKENS)),
        "a profiling run": seen(lambda: profile(llm)),
        "refusals": refusals(model, config),
    }
    with padded_by_nan(model):
        found["prompts in padded rows"] = seen(run)
    # last, since an engine does not go on after a forward that failed
    found["a mask"] = seen(run, torch.ones(1, 1, dtype=torch.bool))
    found["hooks left"] = sum(len(module._forward_pre_hooks) for module in model.modules())
    print(json.dumps(found))


def profile(llm: Any) -> None:
    """A forward of vLLM's own, on nothing."""
    worker = llm.llm_engine.model_executor.driver_worker
    worker.model_runner._dummy_run(8)


def refusals(model: torch.nn.Module, config: Any) -> dict[str, str]:
    """What engines that show nothing are answered with."""
    from vllm.config import CompilationMode, CUDAGraphMode

    from fp8rl.sync.qkv_engine import EngineQKV

    compilation = config.compilation_config
    answers = {}
    for setting, value in [
        ("mode", CompilationMode.DYNAMO_TRACE_ONCE),
        ("cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE),
    ]:
        before = getattr(compilation, setting)
        setattr(compilation, setting, value)
        try:
            EngineQKV(model, config)
        except KVScaleError as error:
            answers[setting] = str(error)
        setattr(compilation, setting, before)
    try:
        EngineQKV(torch.nn.Linear(1, 1), config)
    except KVScaleError as error:
        answers["no attention"] = str(error)
    return answers


@contextmanager
def padded_by_nan(model: torch.nn.Module) -> Iterator[None]:
    """Give every attention layer more rows than are real, as engines that pad to sizes do."""
    from vllm.model_executor.layers.attention import Attention

    def pad(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rows = [x.new_full((PADDING_ROWS, x.shape[1]), torch.nan) for x in args]
        return tuple(torch.cat(pair) for pair in zip(args, rows, strict=True))

    def cut(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output[:-PADDING_ROWS]

    hooks = []
    for module in model.modules():
        if isinstance(module, Attention):
            hooks += [module.register_forward_pre_hook(pad), module.register_forward_hook(cut)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
