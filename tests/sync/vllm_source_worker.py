"""Run in a process of its own: an engine that vLLM's own backend updates, and a fresh one.

Usage: python -m tests.sync.vllm_source_worker BACKEND FOLDER. BACKEND is gloo (any machine, see
gloo_backend.py), ipc (one GPU) or nccl (two). Prints one JSON object: what the updated engine
answers, and what one does that loaded the same tensors from a checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fp8rl.engine.channel import ENVIRONMENT
from fp8rl.sync.source import IterableSource
from tests import helpers

SETTINGS = helpers.settings()
PROMPTS = [[2 + (i * k) % 60 for i in range(40)] for k in (1, 3, 7)]
FINAL = 7


class Client:
    """vLLM's control plane, in this process or through it."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def engine(folder: Path, **changes: Any) -> Any:
    from vllm import LLM

    return LLM(skip_tokenizer_init=True, **SETTINGS.llm_arguments(folder), **changes)


def answers(llm: Any) -> list[Any]:
    """Greedy tokens and their log-probs."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    return [
        [
            list(o.token_ids),
            [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)],
        ]
        for o in outputs
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def trainer(backend: str, llm: Any, source: Any) -> Any:
    """vLLM's trainer side."""
    client = Client(llm)
    if backend == "gloo":
        from tests.sync.gloo_backend import GlooTrainer

        return GlooTrainer.over_gloo(client, source)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info: Any = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=2**20, rank=0)
    if backend == "nccl":
        torch.cuda.set_device(1)  # the engine's worker is on 0
        info = NCCLTrainerInitInfo("127.0.0.1", free_port(), 2, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def main(backend: str, folder: Path) -> None:
    os.environ.update(ENVIRONMENT)
    name = backend
    if backend == "gloo":
        from tests.sync import gloo_backend

        gloo_backend.register()
        name = gloo_backend.BACKEND
    else:  # the engine's core in a process of its own, to which handles travel pickled
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from fp8rl.sync.vllm_source import VLLMWeights

    live = dict(helpers.weights(0))
    device = {"gloo": None, "ipc": "cuda:0", "nccl": "cuda:1"}[backend]
    weights = VLLMWeights(IterableSource(live), SETTINGS.plan(), device=device)
    llm = engine(folder / "live", load_format="dummy", weight_transfer_config={"backend": name})
    sender = trainer(backend, llm, weights)
    found: dict[str, Any] = {}
    for version in (0, FINAL):
        live |= helpers.weights(version)
        weights.kv_scales = helpers.scales(version)
        sender.send_weights()
        llm.reset_prefix_cache()
        found[f"updated to {version}"] = answers(llm)
    sender.shutdown()
    del llm, sender

    (folder / "fresh").mkdir()
    sent = {name: tensor.cpu().clone() for name, tensor in weights}
    save_file(sent, folder / "fresh" / "model.safetensors")
    found["fresh"] = answers(engine(folder / "fresh"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
