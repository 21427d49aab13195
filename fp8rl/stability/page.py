"""The page of a study: is FP8 safe here; a verdict for each arm; claims; curves; how it was run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

import yaml
from markupsafe import Markup

from fp8rl.plots import STYLE
from fp8rl.report import page as kit
from fp8rl.report.equivalence import Word
from fp8rl.report.figures import PANEL_INCHES, figure, figure_row, paint
from fp8rl.report.page import Source
from fp8rl.report.words import show
from fp8rl.run_dir import write_file
from fp8rl.stability import measure as keys
from fp8rl.stability.claims import Answer, verdict_text
from fp8rl.stability.collapse import Collapse
from fp8rl.stability.measure import Measured
from fp8rl.stability.picture import CURVES, Drawn, draw_curve, draw_forest, draw_rewards
from fp8rl.stability.result import Result

VERDICT = Source(
    "The arm's held-out reward minus its baseline's, seed by seed: mean and 95 % interval over "
    "seeds. same: the whole interval lies within the margin; worse, better: it excludes 0.",
    "d +- t(0.975, n - 1) std(d) / sqrt(n)",
    (keys.REWARD,),
    "the last evaluations of each run (last_evaluations)",
    "fp8rl/report/equivalence.py",
    "runs/ARM/seed-N/metrics.jsonl",
)
P_VALUE = Source(
    "How often differences this large come about if each might as well have the other sign; exact. "
    "With five seeds it is never below 0.0625.",
    reference="fp8rl/report/equivalence.py",
)
K3 = Source(
    "Mismatch of rollout and trainer: median over steps, then over seeds.",
    "mean(r - 1 - log r), r = p_train / p_rollout",
    (keys.K3,),
    "every step",
    "correction/metrics.py",
    "runs/ARM/seed-N/metrics.jsonl",
)
COLLAPSED = Source(
    "Runs whose reward fell below half of its best, beyond noise, and stayed there; or whose "
    "numbers broke.",
    reference="fp8rl/stability/collapse.py",
)

ANSWER_STATES: dict[Answer, kit.State] = {
    "reproduced": "good",
    "not reproduced": "bad",
    "undecided": "watch",
    "not measured": "unknown",
}
WORD_STATES: dict[Word, kit.State] = {
    "same": "good",
    "better": "good",
    "worse": "bad",
    "undecided": "watch",
}


def write_page(result: Result, written: Mapping[str, Any]) -> None:
    """Write report.html into the study's folder; ``written`` is its result.json."""
    write_file(result.plan.out / "report.html", study_page(result, written).encode())


def study_page(result: Result, written: Mapping[str, Any]) -> str:
    """The HTML of a study."""
    study, plan = result.plan.study, result.plan
    config = plan.runs[0].config
    shape = f"{config.model.family}, {config.model.num_layers} layers, {config.model.hidden_size}"
    page = kit.Page(
        "Stability of FP8 rollouts",
        f"{len(plan.arms)} arms, {_seeds(study.seeds)} each, up to "
        f"{max(run.config.steps for run in plan.runs)} steps; the first arm: {shape} wide, "
        f"learning rate {config.trainer.learning_rate:g}",
        f"{', '.join(config.task.operations)} of {config.task.min_digits} to "
        f"{config.task.max_digits} digits; "
        f"{config.rollout.prompts_per_step * config.rollout.samples_per_prompt} responses a step",
    )
    for name, why in result.unfinished.items():
        page.add(kit.notice(f"{name} is missing: {why}"))
    page.add(kit.columns(_answer(result), _forest(result)), _arms(result))
    page.section("What the paper claims, and what was measured here", _claims(result))
    drawn = Drawn(result)
    for group in drawn.groups:
        page.section(f"Curves: {group}", _legend(drawn, group), _curves(drawn, group))
    page.section("Collapses", _collapses(result))
    page.section("Every run", _runs(result))
    page.section(
        "How it was run",
        kit.code(str(written["command"])),
        kit.fold("study", kit.code(yaml.safe_dump(written["study"], sort_keys=False))),
        kit.fold("environment", kit.code(yaml.safe_dump(written["environment"], sort_keys=False))),
        kit.prose(kit.download("result.json", json.dumps(written), "Download all numbers as JSON")),
    )
    return page.html()


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _answer(result: Result) -> Markup:
    """Is FP8 safe in this regime: which arms are, which are not."""
    study, named = result.plan.study, dict[str, list[str]]()
    for arm, found in result.verdicts.items():
        word = "collapsed" if result.collapses(arm) else found.word
        named.setdefault(word, []).append(study.arms[arm].title)
    good = [title for word in ("same", "better") for title in named.get(word, [])]
    bad = [title for word in ("worse", "collapsed") for title in named.get(word, [])]
    open_ = named.get("undecided", [])
    sentences = [
        f"{what}: {'; '.join(titles)}."
        for what, titles in (
            ("As good as BF16", good),
            ("Worse, or collapsed", bad),
            (f"Undecided with {_seeds(study.seeds)}", open_),
        )
        if titles
    ]
    question = "Is FP8 safe to train with, in this regime?"
    if not result.verdicts:
        return kit.answer(question, "unknown", "Not judged", "No arm has a baseline to compare.")
    if not bad and not open_:
        return kit.answer(question, "good", "Yes", *sentences)
    if not good and not bad:
        return kit.answer(question, "unknown", "Undecided", *sentences)
    if not good:
        return kit.answer(question, "bad", "Not shown to be" if open_ else "No", *sentences)
    short = "It depends on the arm" if bad else "Yes, where it is decided"
    return kit.answer(question, "watch", short, *sentences)


def _arms(result: Result) -> Markup:
    """A row for each arm."""
    study, rows = result.plan.study, []
    for arm, runs in result.rows.items():
        found = result.verdicts.get(arm)
        k3 = [row.k3 for row in runs if row.k3 is not None]
        against = study.arms[arm].against
        verdict = Markup("baseline" if against is None else "not judged")
        if found is not None:
            marked = Markup('<span class="mark {}">{}</span>')
            verdict = marked.format(WORD_STATES[found.word], found.word)
        rows.append(
            [
                study.arms[arm].title,
                str(study.run_config(arm).steps),
                show(fmean(row.reward for row in runs) if runs else None, ".3f"),
                kit.explained(verdict, VERDICT),
                "" if found is None else verdict_text(found).partition(", ")[2],
                "" if found is None else kit.explained(show(found.p, ".3f"), P_VALUE),
                kit.explained(show(median(k3) if k3 else None, ".1e"), K3),
                kit.explained(f"{len(result.collapsed(arm))} of {len(runs)}", COLLAPSED),
            ]
        )
    heads = (
        "arm",
        "steps",
        "reward",
        "verdict",
        "difference [95 %]",
        "p",
        "mismatch k3",
        "collapsed",
    )
    return kit.table(heads, rows)


def _forest(result: Result) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        height = 0.24 * max(2, len(result.verdicts)) + 0.7
        drawing = Figure(figsize=(PANEL_INCHES[0], height), layout="constrained")
        draw_forest(drawing.subplots(), result, short=True)
        title = "Held-out reward beside the baseline's"
        return figure(drawing, title, "95 % interval; dots are seeds", VERDICT)


def _claims(result: Result) -> Markup:
    source = Source(
        "Factors are of geometric means over seeds; mismatch is a run's median over steps.",
        keys=(keys.K3, keys.REWARD, keys.CACHE),
        reference="FP8-RL, arXiv 2601.18150; fp8rl/stability/claims.py",
        file="runs/ARM/seed-N/metrics.jsonl",
    )
    rows = [
        kit.check_row(
            ANSWER_STATES[claim.answer],
            claim.claim,
            f"{claim.answer}: {claim.measured}",
            ", ".join(claim.arms),
            source,
        )
        for claim in result.claims
    ]
    return _list(rows)


def _list(rows: list[Markup]) -> Markup:
    return Markup('<div class="checks">{}</div>').format(Markup().join(rows))


def _legend(drawn: Drawn, group: str) -> Markup:
    arms = drawn.result.plan.study.arms
    names = (
        kit.swatch(paint(drawn.colours[group, arm]), f"{arms[arm].title}  ")
        for arm in drawn.groups[group]
    )
    return kit.prose(Markup(" ").join(names))


def _curves(drawn: Drawn, group: str) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    figures = []
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=PANEL_INCHES, layout="constrained")
        axes = drawing.subplots()
        draw_rewards(axes, drawn, group)
        axes.set_xlabel("step")
        figures.append(figure(drawing, "Held-out reward", "mean, 95 % interval", VERDICT))
        for curve in CURVES:
            drawing = Figure(figsize=PANEL_INCHES, layout="constrained")
            axes = drawing.subplots()
            draw_curve(axes, drawn, group, curve)
            axes.set_xlabel("step")
            figures.append(figure(drawing, curve.title, "median; seeds thin", curve.source))
    return figure_row(figures)


def _collapses(result: Result) -> Markup:
    rows = [
        _collapse(row, row.collapse)
        for arm in result.rows
        for row in result.collapsed(arm)
        if row.collapse is not None
    ]
    return _list(rows) if rows else kit.prose("No run collapsed, and no run's numbers broke.")


def _collapse(row: Measured, found: Collapse) -> Markup:
    then = row.broke or f"{show(found.found, '.3f')} at step {found.step}"
    best = f"best {show(found.best, '.3f')} at step {found.best_step}"
    name = f"{row.arm}, seed {row.seed}"
    return kit.check_row("bad", name, f"{then}; {best}", found.why, COLLAPSED)


def _runs(result: Result) -> Markup:
    """The numbers of every run."""
    shown = (
        ("reward", "reward", ".3f"),
        ("engine_reward", "by the engine", ".3f"),
        ("area", "area", ".3f"),
        ("k3", "k3", ".1e"),
        ("exp_abs", "exp|dlogp|", ".4f"),
        ("ess", "least ESS", ".3f"),
        ("truncated", "truncated", ".2%"),
        ("rejected", "rejected", ".2%"),
        ("clipped", "clipped", ".2%"),
        ("gradient", "most gradient", ".3g"),
        ("entropy", "entropy", ".3f"),
        ("saturation", "KV saturation", ".2%"),
    )
    rows = [
        [f"{arm}, seed {run.seed}", *(show(getattr(run, key), spec) for key, _, spec in shown)]
        for arm, runs in result.rows.items()
        for run in runs
    ]
    return kit.fold("numbers of each run", kit.table(("run", *(h for _, h, _ in shown)), rows))
