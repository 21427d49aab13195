"""The rollout engine as the trainer sees it: a vLLM process that answers for its weights.

``RolloutEngine`` starts the process (``engine_process.py``), speaks its JSON lines, and is the
client through which a ``Publisher`` updates it. Generation names the weight version it wants; an
engine that holds none as new, or whose last update failed, refuses. A process that dies is noticed
the moment its socket closes, and the error carries the last lines of its log.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8rl.config import Precision
from fp8rl.errors import EngineDiedError, EngineError, StaleWeightsError
from fp8rl.quant import EngineTensor, QuantPlan, WeightPrecision
from fp8rl.sync.manifest import DTYPES, DtypeName

LOG_LINES_SHOWN = 15
DIFFERENCES_SHOWN = 5
STOP_SECONDS = 10.0  # from a closed socket to the end of its process

# Of torchrun's variables none may reach vLLM, which would take them for its own rendezvous.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in our child, not a grandchild
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads must not spin on cores that the trainer needs
    "TORCHDYNAMO_DISABLE": "1",  # eager anyway; spares 15 s of compiling a log-prob rank counter
}


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with.

    hf_config: the model's config.json without quantization. precision: which arm. max_model_len:
    prompt and response, tokens. max_num_seqs: sequences decoded at once. kv_cache_bytes: memory of
    the KV cache. seed: of vLLM itself; requests carry their own.
    """

    hf_config: Mapping[str, Any]
    precision: Precision
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    seed: int = 0

    def plan(self) -> QuantPlan:
        """The quantization plan that trainer and engine share."""
        weights: WeightPrecision = "bf16" if self.precision == "bf16" else "fp8"
        return QuantPlan.from_hf_config(self.hf_config, weights=weights)

    @property
    def fp8_kv(self) -> bool:
        """Whether the KV cache is FP8 and needs scales with every update."""
        return self.precision == "fp8-kv"

    def llm_arguments(self, model_dir: Path) -> dict[str, Any]:
        """Write ``config.json`` into ``model_dir``; return the arguments of ``vllm.LLM``."""
        model_dir.mkdir(parents=True, exist_ok=True)
        config = dict(self.hf_config)
        quantization = self.plan().quantization_config()
        if quantization is not None:
            config["quantization_config"] = quantization
        (model_dir / "config.json").write_text(json.dumps(config, indent=2))
        return {
            "model": str(model_dir),
            "dtype": "bfloat16",
            "kv_cache_dtype": "fp8" if self.fp8_kv else "auto",
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "enforce_eager": True,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Sample:
    """One response: token ids, log-probs under the policy that sampled, version of each token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How to sample: ``temperature`` 0 is greedy; ``samples`` responses a prompt."""

    max_tokens: int
    stop_token: int
    samples: int = 1
    temperature: float = 1.0

    def parameters(self) -> dict[str, Any]:
        """As keyword arguments of ``vllm.SamplingParams``."""
        return {
            "n": self.samples,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop_token_ids": [self.stop_token],
        }


class RolloutEngine:
    """A vLLM process; also the client that a ``Publisher`` updates. Close it, or use ``with``."""

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        """Start the process and return at once; the first request waits until it is up.

        Args:
            settings: what to start.
            folder: gets ``engine.log`` (appended) and ``engine/config.json``.
        """
        self.settings = settings
        self.log_path = folder / "engine.log"
        arguments = settings.llm_arguments(folder / "engine")
        ours, theirs = socket.socketpair()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        with theirs, self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fp8rl.engine_process",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env={**inherited, **threads, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the trainer, which then stops us
            )
        self._socket = ours
        self._lines = ours.makefile("r", encoding="utf-8")
        self._ready = False
        self._unplanned: list[str] = []  # where the engine is not what the plan says
        self._send(arguments)

    def __enter__(self) -> RolloutEngine:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def close(self) -> None:
        """Kill the process, which holds nothing worth saving; calling it again does nothing."""
        self._lines.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def worker_report(self) -> list[dict[str, Any]]:
        """For each worker: its live weight-transfer backend, version, failure and last timings."""
        report: list[dict[str, Any]] = self._call("worker_report")
        return report

    def generate(
        self, prompts: Sequence[Sequence[int]], *, version: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Sample responses under weights not older than ``version``.

        Args:
            prompts: token ids of each prompt.
            version: the oldest weight version that may answer.
            sampling: how, and how many for each prompt.
            seed: the same seed, prompts and weights give the same samples.

        Returns:
            For each prompt its samples, ``sampling.samples`` of them.

        Raises:
            StaleWeightsError: the engine's last update failed, or its weights are older.
            EngineError: vLLM refused the request. EngineDiedError: the process ended.
        """
        seeds = [seed + index * sampling.samples for index in range(len(prompts))]
        groups = self._call(
            "generate",
            prompts=[list(prompt) for prompt in prompts],
            version=version,
            sampling=sampling.parameters(),
            seeds=seeds,
        )
        return [[Sample(**{k: tuple(v) for k, v in s.items()}) for s in group] for group in groups]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell the engine where the trainer's segment lies."""
        self._call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Begin an update; the engine serves nothing until it is finished."""
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Apply and prove an update; raises EngineError with what the engine found wrong."""
        self._call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Commit the update under its version."""
        self._call("finish_weight_update", weight_version=weight_version)

    def wait_ready(self) -> None:
        """Block until the engine is up and audited against the plan.

        Raises:
            EngineDiedError: it does not start. EngineError: its model is not what the plan says.
        """
        if not self._ready:
            self._unplanned = self._audit(self._receive()["tensors"])
            self._ready = True
        if self._unplanned:
            shown = "; ".join(self._unplanned[:DIFFERENCES_SHOWN])
            raise EngineError(
                f"the engine's model differs from the quantization plan in {len(self._unplanned)} "
                f"tensor(s), so nothing is sent to it: {shown}"
            )

    def _audit(self, workers: list[list[tuple[str, DtypeName, list[int]]]]) -> list[str]:
        """Every difference between the plan and the tensors that each worker reports."""
        plan, problems = self.settings.plan(), []
        for tensors in workers:
            found = [EngineTensor(n, DTYPES[dtype], tuple(shape)) for n, dtype, shape in tensors]
            problems += [str(difference) for difference in plan.audit(found)]
        return problems

    def _call(self, method: str, **params: Any) -> Any:
        self.wait_ready()
        self._send({"method": method, "params": params})
        reply = self._receive()
        if "error" not in reply:
            return reply["result"]
        kind = StaleWeightsError if reply["error"] == "StaleWeightsError" else EngineError
        raise kind(f"{reply['error']}: {reply['message']}")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise self._died() from error
        if not line:
            raise self._died()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _died(self) -> EngineDiedError:
        """The error for an engine whose socket closed: how it ended and its log's last lines."""
        try:
            code: int | str = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = "none: still running, its socket closed"
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return EngineDiedError(
            f"the rollout engine (pid {self.pid}) ended, exit code {code}; the last lines of "
            f"{self.log_path}:\n  " + "\n  ".join(lines)
        )
