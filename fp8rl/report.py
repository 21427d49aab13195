"""From a run folder to what is shown of it: result.json, the closing table, report.html.

    reward       held-out, at the first and the last evaluation, and the best one
    mismatch     k3 and exp|dlogp|, means over steps of each step's mean over tokens
    sync         median seconds; bytes of the last update, beside what BF16 would take
    KV scales    how many changed; the highest share of clipped elements of a tensor in a step
    speed        median rollout tokens/s; mean seconds of each phase over all steps

All numbers come from metrics.jsonl, so that a run that was killed has a report too; what the
metrics do not hold is None, shown as "-". The page itself is made in ``report_page.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from rich.table import Table

from fp8rl.plots import curves, phase_names
from fp8rl.report_page import page
from fp8rl.run_dir import Metrics, RunDir, write_file

ARMS = {
    "bf16": "BF16 rollout",
    "fp8": "FP8 weights, BF16 KV cache",
    "kv-only": "BF16 weights, FP8 KV cache",
    "fp8-kv": "FP8 weights and KV cache",
}
CURVES_DPI = 160


def result(
    run: RunDir, *, command: str | None, environment: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What ``RunDir.write_result`` takes: the run's numbers, JSON-able, None where unknown.

    Args:
        run: the folder; its config.yaml and metrics.jsonl are read.
        command: the command line that repeats the run.
        environment: ``fp8rl.environment.environment()``, called where the run ran.

    Raises:
        RunDirError: the metrics are broken.
    """
    metrics = run.metrics()
    heldout = _values(metrics, "reward/heldout")
    sync = _median(_values(metrics, "sync/seconds"))
    timed = [line for line in metrics if "time/step" in line]
    return {
        "command": command,
        "environment": None if environment is None else dict(environment),
        "config": yaml.safe_load(run.config.read_text()),
        "steps": int(metrics[-1]["step"]) if metrics else 0,
        "start_heldout_reward": _first(heldout),
        "end_heldout_reward": _last(heldout),
        "best_heldout_reward": max(heldout, default=None),
        "end_train_reward": _last(_values(metrics, "reward/train")),
        "mismatch_k3_mean": _mean(_values(metrics, "rollout_corr/k3_kl")),
        "exp_abs_diff_mean": _mean(_values(metrics, "rollout_corr/token_mult_prob_error")),
        "truncated_fraction_mean": _mean(
            _values(metrics, "rollout_corr/rollout_is_ratio_fraction_high")
        ),
        "rejected_fraction_mean": _mean(
            _values(metrics, "rollout_corr/rollout_rs_masked_fraction")
        ),
        "kv_saturation_max": max(_values(metrics, "kv/saturation_max"), default=None),
        "kv_scale_changes": _sum(_values(metrics, "kv/changed")),
        "sync_ms_median": None if sync is None else 1000 * sync,
        "sync_bytes": _last(_values(metrics, "sync/bytes")),
        "bf16_bytes": _last(_values(metrics, "sync/bf16_bytes")),
        "tokens_per_second_median": _median(_values(metrics, "rollout/tokens_per_second")),
        "step_seconds_mean": _mean(_values(timed, "time/step")),
        "phase_seconds_mean": {
            name: sum(_values(metrics, f"time/{name}")) / len(metrics)
            for name in phase_names(metrics)
        },
    }


def write_report(path: Path) -> Path:
    """Write curves.png and report.html of the run in the folder ``path``; returns the page's path.

    The command and the environment are those of result.json, where the run wrote one.

    Raises:
        RunDirError: no run is there, or its metrics or result.json are broken.
    """
    run = RunDir.open(path)
    stored = run.read_result() or {}
    found = result(run, command=stored.get("command"), environment=stored.get("environment"))
    metrics = run.metrics()
    title, limit = describe(found["config"]), warn_saturation(found["config"])
    curves(metrics, title, limit).savefig(run.curves, dpi=CURVES_DPI)
    write_file(run.report, page(title, found, headline(found), metrics, limit).encode())
    return run.report


def describe(config: Mapping[str, Any]) -> str:
    """One line: what the rollouts ran in, the trainer if not BF16, the correction, the seed."""
    arm = ARMS[config["rollout"]["precision"]]
    if config["trainer"].get("precision") == "fp8-aligned":  # absent in older runs
        arm += ", FP8-aligned trainer"
    stages = " + ".join(stage["kind"] for stage in config["correction"]["stages"]) or "none"
    bypass = ", bypass" if config["correction"]["mode"] == "bypass" else ""
    return f"{arm}, correction {stages}{bypass}, seed {config['seed']}"


def warn_saturation(config: Mapping[str, Any]) -> float | None:
    """The share of clipped elements above which the run warns; None in runs older than that."""
    limit = (config.get("kv_scales") or {}).get("warn_saturation")
    return None if limit is None else float(limit)


def headline(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The verdict of a ``result``: (what, number, remark) a row, as the table and page show it."""
    start, end = found["start_heldout_reward"], found["end_heldout_reward"]
    sent, bf16 = found["sync_bytes"], found["bf16_bytes"]
    share = f"{sent / bf16:.0%} of BF16's {_mib(bf16)}" if sent and bf16 else ""
    return [
        (
            "held-out reward",
            f"{_show(start, '.3f')} -> {_show(end, '.3f')}",
            f"best {_show(found['best_heldout_reward'], '.3f')}, {found['steps']} steps",
        ),
        ("mismatch KL (k3)", _show(found["mismatch_k3_mean"], ".2e"), "nats a token, mean"),
        (
            "exp|dlogp|",
            _show(found["exp_abs_diff_mean"], ".4f"),
            "mean; 1 is no mismatch, below 1.05 is acceptable",
        ),
        (
            "truncated / rejected",
            f"{_show(found['truncated_fraction_mean'], '.3%')} / "
            f"{_show(found['rejected_fraction_mean'], '.3%')}",
            "of response tokens, mean",
        ),
        *_kv_row(found),
        (
            "weight sync",
            _show(found["sync_ms_median"], ".0f", " ms"),
            "median, proven by read-back",
        ),
        ("sync size", _mib(sent), share),
        (
            "rollout speed",
            _show(found["tokens_per_second_median"], ",.0f", " tokens/s"),
            "median",
        ),
        ("step", _show(found["step_seconds_mean"], ".2f", " s"), "mean, all phases"),
    ]


def percent(share: float | None) -> str:
    """A share of 1 in percent, two digits; "-" where it is not known."""
    if share is None:
        return "-"
    return "0 %" if share == 0 else f"{100 * share:.2g} %"


def closing_table(found: Mapping[str, Any]) -> Table:
    """What a run ends with on the terminal, from its ``result``."""
    table = Table(title=describe(found["config"]), title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(style="bold", justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in headline(found):
        table.add_row(*row)
    return table


def _kv_row(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What the KV scales clipped; no row where the cache is BF16."""
    clipped, changes = found["kv_saturation_max"], found["kv_scale_changes"] or 0
    if clipped is None:
        return []
    remark = f"clipped at most, of a tensor in a step; {changes} scale changes"
    return [("KV saturation", percent(clipped), remark)]


def _values(metrics: Sequence[Metrics], key: str) -> list[float]:
    """The finite values of ``key``, in order."""
    values = [float(line[key]) for line in metrics if key in line]
    return [value for value in values if math.isfinite(value)]


def _first(values: Sequence[float]) -> float | None:
    return values[0] if values else None


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _sum(values: Sequence[float]) -> int | None:
    return int(sum(values)) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _show(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.2f} MiB"
