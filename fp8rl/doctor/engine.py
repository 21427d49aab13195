"""What only a live engine can tell: whether our plugin is in its workers, and takes KV scales.

Also whether its FP8 layers take FP8 inputs (W8A8) where that is asked for, as it is here.

vLLM says nothing about a plugin that fails to load, nor about KV scales that it leaves aside (an
engine with BF16 weights does). So the doctor starts a tiny one, publishes random weights and
scales through the real ``Publisher``, and reads the scales back from every worker.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fp8rl.config.model import VOCAB_MULTIPLE, ModelConfig
from fp8rl.config.rollout import BF16_WEIGHTS, Precision
from fp8rl.doctor.machine import Finding, Machine, problems
from fp8rl.engine.rollout import RolloutEngine
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineError
from fp8rl.quant import KVScales
from fp8rl.sync.plugin import RECEIVER
from fp8rl.sync.publisher import Publisher
from fp8rl.sync.source import IterableSource
from fp8rl.trainer.megatron_model import hf_config

TINY_LAYERS = 2
TINY_LENGTH = 32  # tokens; the engine generates nothing
TINY_CACHE = 64 << 20  # bytes
ARMS: tuple[Precision, ...] = ("fp8-kv", "kv-only", "bf16")  # the first that runs here is started
SHOWN = 3  # names of scales that are not as sent


def examine_engine(machine: Machine | None = None) -> list[Finding]:
    """Start a tiny engine in the fullest arm of this machine, and look into its workers."""
    machine = machine or Machine.here()
    if not {"vllm", "transformers"} <= machine.modules:
        return [Finding("engine", "not started: vllm is not installed", "missing", "no rollouts")]
    runs_here = [arm for arm in ARMS if not problems(arm, machine)]
    precision: Precision = (runs_here or ["bf16"])[0]
    settings = EngineSettings(
        hf_config=hf_config(ModelConfig(num_layers=TINY_LAYERS), VOCAB_MULTIPLE, TINY_LENGTH),
        precision=precision,
        max_model_len=TINY_LENGTH,
        max_num_seqs=1,
        kv_cache_bytes=TINY_CACHE,
        activations=None if precision in BF16_WEIGHTS else "fp8",
    )
    with TemporaryDirectory(prefix="fp8rl-doctor-") as folder:
        try:
            with RolloutEngine(settings, Path(folder)) as engine:
                rows = [Finding("engine", f"starts ({precision})", "ok"), *_plugins(engine)]
                return [*rows, _scales(engine)] if settings.fp8_kv else rows
        except EngineError as error:
            return [Finding(f"{precision} engine", str(error), "missing", "no rollouts")]


def _plugins(engine: RolloutEngine) -> list[Finding]:
    """The weight-transfer backend that is live in each worker."""
    rows, report = [], engine.worker_report()
    for rank, worker in enumerate(report):
        right = worker["backend"] == RECEIVER[1]
        cost = "" if right else "no weight update reaches this worker: reinstall fp8rl"
        name, backend = f"worker {rank} plugin", worker["backend"]
        rows.append(Finding(name, backend, "ok" if right else "missing", cost))
    if engine.settings.activations == "fp8":  # the engine would have refused to be less
        inputs = [found for worker in report for found in worker["activations"].values()]
        live = f"W8A8 in {inputs.count('fp8')} of {len(inputs)} FP8 layers"
        rows.append(Finding("FP8 activations", live, "ok"))
    return rows


def _scales(engine: RolloutEngine) -> Finding:
    """Publish random weights with KV scales; find the scales in every worker's live buffers."""
    plan, generator = engine.settings.plan(), torch.Generator().manual_seed(0)
    weights = {
        entry.name: torch.empty(entry.shape).normal_(0, 0.02, generator=generator).bfloat16()
        for entry in plan.entries
    }
    amax = torch.rand(TINY_LAYERS, 3, generator=generator) * 1000 + 1  # of several octaves
    scales = KVScales.from_amax(amax, version=0, tokens=1)
    cost = "no FP8 KV cache: use --precision fp8 or bf16"
    try:
        with Publisher(plan, engine, kv_layers=TINY_LAYERS) as publisher:
            publisher.publish(IterableSource(weights), version=0, kv_scales=scales)
    except EngineError as error:
        return Finding("KV scales", f"the engine refused them: {error}", "missing", cost)
    sent = {name: float(value) for name, value in scales.tensors().items()}
    wrong = set()
    for worker in engine.kv_state():
        held = {f"{layer}.{x}_scale": set(v) for layer, of in worker.items() for x, v in of.items()}
        wrong |= {name for name, value in sent.items() if held.get(name) != {value}}
    found = f"{len(sent)} published, {len(sent) - len(wrong)} proven"
    if not wrong:
        return Finding("KV scales", found, "ok")
    named = ", ".join(sorted(wrong)[:SHOWN])
    return Finding("KV scales", f"{found}; not as sent: {named}", "missing", cost)
