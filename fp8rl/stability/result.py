"""What came of a study: result.json, claims.md, the table on the terminal.

    rows       the numbers of every run that has ended, or whose numbers broke
    verdicts   each arm against its baseline, and how many of its runs collapsed
    claims     the paper's, beside what was measured
    unfinished runs that have not ended, and why

The same from the same folders, whenever it is made: it can be drawn anew from a study's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from rich.table import Table
from rich.text import Text

from fp8rl.config.file import dump_config
from fp8rl.environment import environment
from fp8rl.errors import RunDirError
from fp8rl.report.equivalence import Verdict, judge
from fp8rl.report.words import show
from fp8rl.run_dir import write_file
from fp8rl.stability.claims import MARKS, Claim, Evidence, claims, markdown, verdict_text
from fp8rl.stability.measure import Measured, measure
from fp8rl.stability.plan import Plan

COLOURS = {"same": "green", "better": "green", "worse": "red", "undecided": "yellow"}


@dataclass(frozen=True)
class Result:
    """A study as it stands."""

    plan: Plan
    rows: Mapping[str, list[Measured]]  # arm -> its runs that have numbers
    verdicts: Mapping[str, Verdict]  # arms judged, that have a seed in common with their baseline
    areas: Mapping[str, Verdict]  # the same for the area under the curve
    claims: list[Claim]
    unfinished: Mapping[str, str]  # run -> why

    @classmethod
    def of(cls, plan: Plan, bench: Mapping[str, Any] | None = None) -> Self:
        """Look at the folders of a study; ``bench`` is a result of ``fp8rl bench rollout``.

        Raises:
            RunDirError: a run's metrics are broken.
        """
        last = plan.study.last_evaluations
        rows: dict[str, list[Measured]] = {arm: [] for arm in plan.arms}
        unfinished = {}
        for run in plan.runs:
            found = measure(run, last)
            if found is not None:
                rows[run.arm].append(found)
            else:
                failure = run.failure()
                why = f"{failure.error}: {failure.message}" if failure else f"it is {run.state}"
                unfinished[run.name] = why
        verdicts, areas = _verdicts(plan, rows, "reward"), _verdicts(plan, rows, "area")
        found_claims = claims(Evidence(rows, verdicts), bench)
        return cls(plan, rows, verdicts, areas, found_claims, unfinished)

    def collapsed(self, arm: str) -> list[Measured]:
        """The runs of an arm that lost what they had learned."""
        return [row for row in self.rows[arm] if row.collapse is not None]

    def collapses(self, arm: str) -> bool:
        """Whether more seeds of an arm collapsed than of what it is held against."""
        against = self.plan.study.arms[arm].against
        usual = len(self.collapsed(against)) if against and against in self.rows else 0
        return len(self.collapsed(arm)) > usual

    def to_json(self, command: str) -> dict[str, Any]:
        """All of it as JSON values."""
        study = self.plan.study
        return {
            "command": command,
            "environment": environment(),
            "study": study.model_dump(mode="json"),
            "rows": [row.to_json() for rows in self.rows.values() for row in rows],
            "verdicts": {arm: asdict(found) for arm, found in self.verdicts.items()},
            "areas": {arm: asdict(found) for arm, found in self.areas.items()},
            "collapsed": {arm: len(self.collapsed(arm)) for arm in self.rows},
            "claims": [asdict(claim) for claim in self.claims],
            "unfinished": dict(self.unfinished),
        }

    def write(self, command: str) -> dict[str, Any]:
        """Write config.yaml, result.json and claims.md into the study's folder."""
        out, found = self.plan.out, self.to_json(command)
        write_file(out / "config.yaml", dump_config(self.plan.study).encode())
        write_file(out / "result.json", json.dumps(found, indent=1, allow_nan=False).encode())
        write_file(out / "claims.md", markdown(self.claims).encode())
        return found

    def table(self) -> Table:
        """A row for each arm: its reward, its verdict, its mismatch, how many collapsed."""
        table = Table(title="Held-out reward beside the baseline's", title_justify="left")
        for heading in ("arm", "reward", "verdict", "difference, 95 %", "p", "k3", "collapsed"):
            left = heading in ("arm", "verdict")
            table.add_column(heading, justify="left" if left else "right")
        for arm, rows in self.rows.items():
            found = self.verdicts.get(arm)
            word = Text("-") if found is None else Text(found.word, COLOURS[found.word])
            k3 = [row.k3 for row in rows if row.k3 is not None]
            table.add_row(
                self.plan.study.arms[arm].title,
                show(fmean(row.reward for row in rows) if rows else None, ".3f"),
                word,
                "" if found is None else verdict_text(found).partition(", ")[2],
                "" if found is None else show(found.p, ".3f"),
                show(median(k3) if k3 else None, ".1e"),
                f"{len(self.collapsed(arm))}/{len(rows)}",
            )
        return table


def claims_table(found: list[Claim]) -> Table:
    """The claims, a row each."""
    table = Table(title="Claims of FP8-RL (arXiv 2601.18150)", title_justify="left")
    for heading in ("claim", "reproduced", "measured"):
        table.add_column(heading, overflow="fold")
    for claim in found:
        table.add_row(Text(claim.claim), MARKS[claim.answer], Text(claim.measured))
    return table


def read_bench(folder: Path) -> dict[str, Any]:
    """The result of ``fp8rl bench rollout`` in ``folder``.

    Raises:
        RunDirError: none is there.
    """
    path = folder / "result.json"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: is no result of `fp8rl bench rollout`: {error}") from error
    if not isinstance(found, dict) or found.get("bench") != "rollout":
        raise RunDirError(f"{path}: is no result of `fp8rl bench rollout`")
    return found


def _verdicts(plan: Plan, rows: Mapping[str, list[Measured]], key: str) -> dict[str, Verdict]:
    by_arm = {arm: {r.seed: float(getattr(r, key)) for r in found} for arm, found in rows.items()}
    found = {}
    for arm in plan.arms:
        against, judged = plan.study.arms[arm].against, plan.study.arms[arm].judged
        if judged and against in by_arm:
            verdict = judge(by_arm[arm], by_arm[against], plan.study.margin)
            if verdict is not None:
                found[arm] = verdict
    return found
