"""From a run folder to what is shown of it: result.json, the closing table, report.html.

    verdict      is FP8 safe for this run (``verdict.py``)
    reward       held-out, at the first and the last evaluation, and the best one
    mismatch     k3 and exp|dlogp|, means over steps of each step's mean over tokens
    fell back    from which step on to what, and why, where drift asked for it
    sync         median seconds; bytes of the last update, beside what BF16 would take
    KV scales    how many changed; the highest share of clipped elements of a tensor in a step
    speed        median rollout tokens/s; mean seconds of each phase over all steps

All numbers come from metrics.jsonl, so that a run that was killed has a report too; what the
metrics do not hold is None, shown as "-". The page itself is made in ``run_page.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fp8rl.errors import RunDirError
from fp8rl.report.comparison import compare
from fp8rl.report.comparison_page import comparison_page
from fp8rl.report.curves import curves, phase_names
from fp8rl.report.curves_drift import drift_figure, probed
from fp8rl.report.data import RunData
from fp8rl.report.run_page import run_page
from fp8rl.report.verdict import judge
from fp8rl.report.words import describe, mib, percent, show, since, warn_saturation
from fp8rl.run_dir import RunDir, write_file

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
        RunDirError: the config or the metrics are broken.
    """
    data = RunData.load(run.path)
    heldout, sync = data.series("reward/heldout"), data.series("sync/seconds").median
    changes = data.series("kv/changed").total
    return {
        "command": command,
        "environment": None if environment is None else dict(environment),
        "config": data.config,
        "precision": data.last_precision,
        "fell_back": [asdict(one) for one in data.fell_back],
        "steps": data.steps,
        "verdict": judge(data).to_json(),
        "start_heldout_reward": heldout.first,
        "end_heldout_reward": heldout.last,
        "best_heldout_reward": heldout.max,
        "end_train_reward": data.series("reward/train").last,
        "mismatch_k3_mean": data.series("rollout_corr/k3_kl").mean,
        "exp_abs_diff_mean": data.series("rollout_corr/token_mult_prob_error").mean,
        "truncated_fraction_mean": data.series("rollout_corr/rollout_is_ratio_fraction_high").mean,
        "rejected_fraction_mean": data.series("rollout_corr/rollout_rs_masked_fraction").mean,
        "kv_saturation_max": data.series("kv/saturation_max").max,
        "kv_scale_changes": None if changes is None else int(changes),
        "kv_cache_tokens": data.series("rollout/kv_cache_tokens").last,
        "sync_ms_median": None if sync is None else 1000 * sync,
        "sync_bytes": data.series("sync/bytes").last,
        "bf16_bytes": data.series("sync/bf16_bytes").last,
        "tokens_per_second_median": data.series("rollout/tokens_per_second").median,
        "step_seconds_mean": data.series("time/step").mean,
        "phase_seconds_mean": {
            name: (data.series(f"time/{name}").total or 0.0) / len(data.metrics)
            for name in phase_names(data.metrics)
        },
    }


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the page, curves.png and, where there were probes, drift.png of the run in ``path``.

    Returns the page's path.

    The command and the environment are those of result.json, where the run wrote one.

    Args:
        path: the run's folder, which gets the pictures.
        out: where the page goes; report.html in the folder unless given.

    Raises:
        RunDirError: no run is there, its config, metrics or result.json are broken, or no file can
            be written to ``out``.
    """
    if out is not None:
        _check_page(out)
    data, run = RunData.load(path), RunDir(path)
    title = describe(data.config) + since(data.fell_back)
    limit = warn_saturation(data.config)
    curves(data.metrics, title, limit).savefig(run.curves, dpi=CURVES_DPI)
    if probed(data.metrics):
        drift_figure(data.metrics, title).savefig(run.drift, dpi=CURVES_DPI)
    page = out or run.report
    write_file(page, run_page(data).encode())
    return page


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs side by side to ``out``; returns its path.

    Raises:
        RunDirError: a folder holds no run, the runs cannot be compared (see ``compare``), or no
            file can be written to ``out``.
    """
    _check_page(out)
    found = compare([RunData.load(path) for path in paths])
    write_file(out, comparison_page(found).encode())
    return out


def _check_page(path: Path) -> None:
    """Refuse a place for a page, before runs are read.

    Raises:
        RunDirError: it is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise RunDirError(
            f"{path}: is a folder; give the page's file, such as {path / 'report.html'}"
        )
    if not path.parent.is_dir():
        raise RunDirError(
            f"{path}: the page cannot be written, for {path.parent} is no folder; make it, or give "
            "another file"
        )


def headline(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The verdict of a ``result``: (what, number, remark) a row, as the table and page show it."""
    start, end = found["start_heldout_reward"], found["end_heldout_reward"]
    sent, bf16 = found["sync_bytes"], found["bf16_bytes"]
    share = f"{sent / bf16:.0%} of BF16's {mib(bf16)}" if sent and bf16 else ""
    return [
        ("is FP8 safe here", found["verdict"]["word"], _open_checks(found["verdict"])),
        *[
            ("fell back", f"{one['precision']} from step {one['step']} on", one["why"])
            for one in found["fell_back"]
        ],
        (
            "held-out reward",
            f"{show(start, '.3f')} -> {show(end, '.3f')}",
            f"best {show(found['best_heldout_reward'], '.3f')}, {found['steps']} steps",
        ),
        ("mismatch KL (k3)", show(found["mismatch_k3_mean"], ".2e"), "nats a token, mean"),
        (
            "exp|dlogp|",
            show(found["exp_abs_diff_mean"], ".4f"),
            "mean; 1 is no mismatch, below 1.05 is acceptable",
        ),
        (
            "truncated / rejected",
            f"{show(found['truncated_fraction_mean'], '.3%')} / "
            f"{show(found['rejected_fraction_mean'], '.3%')}",
            "of response tokens, mean",
        ),
        *_kv_row(found),
        (
            "weight sync",
            show(found["sync_ms_median"], ".0f", " ms"),
            "median, proven by read-back",
        ),
        ("sync size", mib(sent), share),
        (
            "rollout speed",
            show(found["tokens_per_second_median"], ",.0f", " tokens/s"),
            "median",
        ),
        ("step", show(found["step_seconds_mean"], ".2f", " s"), "mean, all phases"),
    ]


def _open_checks(verdict: Mapping[str, Any]) -> str:
    """The checks that did not pass, with what they found."""
    rows = [row for row in verdict["checks"] if row["state"] in ("bad", "watch")]
    if not rows:
        passed = sum(row["state"] == "good" for row in verdict["checks"])
        return f"{passed} of {len(verdict['checks'])} checks passed"
    return "; ".join(f"{row['name']}: {row['found']}" for row in rows)


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
