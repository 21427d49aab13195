"""Run in a process of its own: a vLLM as veRL starts one, and versions as veRL carries them.

Usage: python -m tests.integrations.engine_worker FOLDER [moe]. Prints one JSON object: what was
seen, or for a mixture of experts the report of its first update.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests import helpers

PROMPT = [2 + i % 60 for i in range(40)]
EXTENSION = "fp8rl.integrations.verl.proven_updates.ProvenUpdates"


def veRL_arguments(folder: Path) -> dict[str, Any]:
    """What veRL's `quantization=fp8` and `kv_cache_dtype=fp8` make of a BF16 model's folder."""
    arguments = helpers.settings("bf16").llm_arguments(folder)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "ignored_layers": [f"model.layers.{i}.mlp.gate" for i in range(helpers.LAYERS)],
    }
    return {
        **arguments,
        "quantization": "fp8",
        "hf_overrides": {"quantization_config": quantization},
        "kv_cache_dtype": "fp8",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "worker_extension_cls": EXTENSION,
    }


def veRL_weights(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A generator that runs once, of fp32 tensors under FSDP's names, in an order of its own."""
    for name, tensor in reversed(helpers.weights(seed).items()):
        yield f"_fsdp_wrapped_module.{name}", tensor.float()


def take(worker: Any, messages: list[tuple[str, torch.Tensor]]) -> Any:
    """Run in the worker: what its extension does with veRL's buckets."""
    updates = worker.fp8rl_updates()
    updates.begin()
    updates.take(messages)
    updates.finish()
    return updates.report()


def experts(folder: Path) -> None:
    """One update of a small Qwen3-MoE, with the quantization that veRL gives its engine."""
    from tests.sync.engine_models import config  # sets the environment

    settings = config("qwen3_moe")
    arguments = veRL_arguments(folder) | {"kv_cache_dtype": "auto", "max_model_len": 256}
    (folder / "config.json").write_text(json.dumps(settings))
    from vllm import LLM

    from fp8rl.integrations.verl.settings import SyncSettings
    from fp8rl.integrations.verl.wire import Sender

    sender = Sender(SyncSettings(model_path=str(folder)))
    weights = helpers.weights(1, config=settings)
    messages = list(sender.stages(weights.items(), step=1))
    [report] = LLM(**arguments).collective_rpc(take, args=(messages,))
    print(json.dumps(report))


def main(folder: Path) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from fp8rl.integrations.verl import checkpoint_engine
    from fp8rl.integrations.verl.settings import SyncSettings
    from fp8rl.integrations.verl.wire import Sender, use_kv_scales

    llm = LLM(**veRL_arguments(folder))
    use_kv_scales(helpers.scales)
    sender = Sender(SyncSettings(model_path=str(folder), kv_cache_dtype="fp8"))

    def updated(messages: list[tuple[str, torch.Tensor]]) -> Any:
        [report] = llm.collective_rpc(take, args=(messages,))
        assert llm.reset_prefix_cache()  # as veRL does after every update
        return report

    def answer() -> list[int]:
        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def refused(messages: list[tuple[str, torch.Tensor]]) -> str:
        try:
            updated(messages)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    seen: dict[str, Any] = {}
    seen["first"] = updated(list(sender.stages(veRL_weights(1), step=7, stage_bytes=100_000)))
    first = answer()
    messages = list(sender.stages(veRL_weights(2), step=8))
    damaged = [(name, data.clone()) for name, data in messages]
    damaged[0][1][5] += 1
    seen["damaged"] = refused(damaged)
    seen["gap"] = refused(messages[1:])
    seen["plain"] = refused([("model.norm.weight", torch.ones(256))])
    seen["held"] = llm.collective_rpc("fp8rl_report")[0]["version"]

    # and once more the whole way: through our checkpoint engine, between two threads
    checkpoint_engine._own_address = lambda: "127.0.0.1"
    settings = {"model_path": str(folder), "kv_cache_dtype": "fp8", "transport": "gloo"}
    trainer = checkpoint_engine.FP8Transfer(2**27, is_master=True, **settings)
    rollout = checkpoint_engine.FP8Transfer(2**27, **settings)
    assert trainer._sender is not None
    trainer._sender._last = sender._last
    metadata = [trainer.prepare(), rollout.prepare()]
    of_trainer, of_rollout = trainer.build_topology(1, 1, metadata)

    def send() -> Any:
        trainer.init_process_group(**{key: value[0] for key, value in of_trainer.items()})
        return asyncio.run(trainer.send_weights(veRL_weights(2), global_steps=9))

    async def received() -> list[tuple[str, torch.Tensor]]:
        return [message async for message in rollout.receive_weights(global_steps=9)]

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        rollout.init_process_group(**{key: value[0] for key, value in of_rollout.items()})
        seen["second"] = updated(asyncio.run(received()))
        sent.result()
    trainer.finalize()
    rollout.finalize()
    second = answer()
    updated(list(sender.stages(veRL_weights(1), step=12)))
    seen["answers"] = [first != second, answer() == first]
    print(json.dumps(seen))


if __name__ == "__main__":
    (experts if "moe" in sys.argv else main)(Path(sys.argv[1]))
