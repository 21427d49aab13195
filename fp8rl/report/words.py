"""How a run is called, and how its numbers are written, on terminals and pages alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8rl.report.data import FellBack

ARMS = {
    "bf16": "BF16 rollout",
    "fp8": "FP8 weights, BF16 KV cache",
    "kv-only": "BF16 weights, FP8 KV cache",
    "fp8-kv": "FP8 weights and KV cache",
}
SHORT_ARMS = {
    "bf16": "BF16",
    "fp8": "FP8 weights",
    "kv-only": "FP8 KV",
    "fp8-kv": "FP8 weights + KV",
}
KV_SCALES = {
    "every-step": "",
    "once": ", KV scales of version 0 alone",
    "never": ", KV scales all 1.0",
}


def describe(config: Mapping[str, Any]) -> str:
    """One line: what the rollouts ran in, the trainer if not BF16, the correction, the seed."""
    return f"{arm(config)}, correction {correction(config)}, seed {config['seed']}"


def arm(config: Mapping[str, Any]) -> str:
    """What the rollouts ran in, and the trainer where it is not BF16."""
    named = ARMS[config["rollout"]["precision"]]
    if config["rollout"].get("activations") == "fp8":  # absent in older runs, as those below
        named += ", FP8 activations (W8A8)"
    if config["rollout"].get("scale_format") == "fp32":
        named += ", fp32 weight scales"
    if config["rollout"].get("router") == "fp8-rounded":
        named += ", routers rounded to FP8"
    if config["trainer"].get("precision") == "fp8-aligned":  # absent in older runs
        named += ", FP8-aligned trainer"
    if config["rollout"]["precision"] in ("kv-only", "fp8-kv"):
        named += KV_SCALES[(config.get("kv_scales") or {}).get("recalibrate", "every-step")]
    return named


def fell_back(found: FellBack) -> str:
    """One sentence: what a run went on in, from when on, and why."""
    return f"From step {found.step} on, for good: {ARMS[found.precision]}. Why: {found.why}."


def since(found: Sequence[FellBack]) -> str:
    """The same for the end of a line: ``; kv-only from step 16 on``; nothing where it did not."""
    return "".join(f"; {one.precision} from step {one.step} on" for one in found)


def correction(config: Mapping[str, Any]) -> str:
    """The kinds of the correction's stages, as ``tis`` or ``reject + tis``."""
    section = config["correction"]
    stages = section.get("stages", [section])  # one stage alone in older runs
    kinds = " + ".join(stage["kind"] for stage in stages) or "none"
    return f"{kinds}, bypass" if section.get("mode") == "bypass" else kinds


def warn_saturation(config: Mapping[str, Any]) -> float | None:
    """The share of clipped elements above which the run warns; None in runs older than that."""
    limit = (config.get("kv_scales") or {}).get("warn_saturation")
    return None if limit is None else float(limit)


def percent(share: float | None) -> str:
    """A share of 1 in percent, two digits; "-" where it is not known."""
    if share is None:
        return "-"
    return "0 %" if share == 0 else f"{100 * share:.2g} %"


def show(value: float | None, spec: str, unit: str = "") -> str:
    """A number by a format; "-" where it is not known."""
    return "-" if value is None else f"{value:{spec}}{unit}"


def mib(value: float | None) -> str:
    """Bytes as MiB; "-" where they are not known."""
    return show(None if value is None else value / 2**20, ".2f", " MiB")
