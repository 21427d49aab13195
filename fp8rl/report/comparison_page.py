"""The page of several runs: is FP8 safe and what it bought against the baseline; then the why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from markupsafe import Markup

from fp8rl.report import equivalence
from fp8rl.report import page as kit
from fp8rl.report.comparison import (
    Arm,
    Comparison,
    configuration_differences,
    differences,
    other_machines,
)
from fp8rl.report.equivalence import MARGIN
from fp8rl.report.figures import figure, figure_row, paint
from fp8rl.report.overlay import overlays
from fp8rl.report.page import Fact, State
from fp8rl.report.quantities import BYTES, CACHE, QUANTITIES, SPEED, STEP, Quantity, reward
from fp8rl.report.run_page import check_list, columns_of
from fp8rl.report.statistics import Interval, difference, interval, ratio
from fp8rl.report.verdict import WORDS, in_a_sentence, judge
from fp8rl.report.words import fell_back

NAMED_ARMS = 2  # in a title
WORST_FIRST: tuple[State, ...] = ("bad", "watch", "unknown", "good")
FOUND: dict[equivalence.Word, str] = {
    "same": f"no difference that matters, for it lies within \u00b1{MARGIN:g}",
    "worse": "it is worse",
    "better": "it is better",
    "undecided": f"undecided, for the interval holds 0 and reaches beyond \u00b1{MARGIN:g}",
}
ONE_SEED = "one seed cannot say whether that is chance"


def comparison_page(found: Comparison) -> str:
    """The HTML of a comparison."""
    rewards = reward(found.runs)
    page = kit.Page(_title(found), _subtitle(found))
    page.add(*_notices(found))
    judged = [(arm, *_judge(arm, found.baseline, rewards)) for arm in found.arms if arm.fp8]
    page.add(kit.columns(_answer(judged), kit.facts("What it bought", _bought(found))))
    page.add(_arm_rows(judged, rewards))
    page.section("Numbers", _numbers(found, [rewards, *QUANTITIES]))
    drawn = overlays(found.arms)
    page.section(
        "Curves",
        kit.prose(Markup(" \u2003 ").join(_named(arm) for arm in found.arms)),
        figure_row(figure(p.figure, p.title, p.note, p.source) for p in drawn),
    )
    page.section("What was configured differently", _configuration(found.arms))
    page.section("Checks of each run", *_checks(found.arms))
    page.section("Where it ran", _environments(found), *_commands(found), _data(found))
    return page.html()


def _title(found: Comparison) -> str:
    if not found.others:
        return f"{found.baseline.name}, {_seeds(found.baseline)}"
    named = len(found.others) <= NAMED_ARMS
    others = _list([a.name for a in found.others]) if named else f"{len(found.others)} arms"
    return f"{others} against {found.baseline.name}"


def _subtitle(found: Comparison) -> str:
    steps = sorted({run.planned for run in found.runs})
    spread = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    counted = {len(arm.runs) for arm in found.arms}
    seeds = f"{counted.pop()} of each arm" if len(counted) == 1 else "of some arms more than others"
    return f"{len(found.runs)} runs of {spread} steps, {seeds}; baseline {found.baseline.name}"


def _notices(found: Comparison) -> Iterator[Markup]:
    for arm in found.arms:
        for run in arm.runs:
            if not run.ended:
                where = f"{arm.called(run)} stopped at step {run.steps} of {run.planned}"
                yield kit.notice(f"{where}, or is still running: its numbers are of fewer steps.")
            for one in run.fell_back:
                yield kit.notice(f"{arm.called(run)}: {fell_back(one)}")
    machines = other_machines(found.runs)
    if machines:
        differing = ", ".join(machines)
        yield kit.notice(
            f"These runs were not made on one machine ({differing} differ): do not compare their "
            "times and speeds."
        )


def _judge(arm: Arm, baseline: Arm, rewards: Quantity) -> tuple[State, str]:
    """The worst verdict of an arm's runs, or its reward's loss against the baseline if worse."""
    verdicts = [judge(run) for run in arm.runs]
    state = min((v.state for v in verdicts), key=WORST_FIRST.index)
    same = sum(v.state == state for v in verdicts)
    open_checks = dict.fromkeys(name for v in verdicts for name in v.named("watch", "bad"))
    why = f": {in_a_sentence([*open_checks])}" if open_checks else ""
    runs = f" in {same} of {len(verdicts)} runs" if len(verdicts) > 1 else ""
    sentence = f"{WORDS[state]}{runs}{why}."
    if arm is baseline:
        return state, sentence
    sides = arm.values(rewards.of), baseline.values(rewards.of)
    against, apart = equivalence.judge(*sides, MARGIN), difference(*sides)
    if against is None or apart is None:
        return state, f"{sentence} No seed has a {rewards.name} both here and in {baseline.name}."
    why = ONE_SEED if against.n == 1 else FOUND[against.word]
    sentence += f" Held-out reward {_signed(apart)} against {baseline.name}: {why}."
    return "bad" if against.word == "worse" else state, sentence


def _answer(judged: Sequence[tuple[Arm, State, str]]) -> Markup:
    question = "Is FP8 safe here?"
    if not judged:
        return kit.answer(question, "unknown", "BF16 runs", "There is no FP8 here to judge.")
    state = min((state for _, state, _ in judged), key=WORST_FIRST.index)
    if len({state for _, state, _ in judged}) == 1:
        sentences = [f"{arm.name}: {why}" if len(judged) > 1 else why for arm, _, why in judged]
        return kit.answer(question, state, WORDS[state], *sentences)
    counted = Counter(WORDS[state] for _, state, _ in judged)
    found = ", ".join(f"{count} of {len(judged)} arms: {word}" for word, count in counted.items())
    return kit.answer(question, state, "Not every arm", f"{found}.", "Each arm stands below.")


def _arm_rows(judged: Sequence[tuple[Arm, State, str]], rewards: Quantity) -> Markup:
    """Each FP8 arm with its verdict, where there are several."""
    if len(judged) < 2:
        return Markup()
    rows = [
        kit.check_row(state, arm.name, why, _seeds(arm), rewards.source)
        for arm, state, why in judged
    ]
    return Markup('<div class="checks">{}</div>').format(Markup().join(rows))


def _bought(found: Comparison) -> Iterator[Fact]:
    """Factors against the baseline; of each arm where there are several."""
    arms = [arm for arm in found.others if arm.fp8]
    shown = (CACHE, BYTES, SPEED, STEP) if len(arms) == 1 else (CACHE, SPEED)
    for arm in arms:
        for quantity in shown:
            factor = ratio(arm.values(quantity.of), found.baseline.values(quantity.of))
            if factor is None:
                continue
            whose = "" if len(arms) == 1 else f"{arm.name}: "
            ours, theirs = (_mean(quantity, side) for side in (arm, found.baseline))
            spread = _range(factor, ".2f", "; 95 %: {}")
            remark = f"{whose}{ours}, {found.baseline.name} {theirs}{spread}"
            yield Fact(f"{factor.mean:.2f}\u00d7", quantity.name, remark, quantity.source)


def _numbers(found: Comparison, quantities: Sequence[Quantity]) -> Markup:
    """Quantities by arm: mean and interval over seeds, and below it the difference."""
    heads = ["mean over seeds", *(arm.name for arm in found.arms)]
    rows = []
    for quantity in quantities:
        if any(arm.values(quantity.of) for arm in found.arms):
            cells = [_cell(quantity, arm, found.baseline) for arm in found.arms]
            rows.append([kit.explained(quantity.name, quantity.source), *cells])
    note = kit.prose(
        "\u00b1 is half the 95 % interval of the mean over seeds (Student's t). Below it the "
        f"difference to {found.baseline.name}, with its interval: paired over the seeds that both "
        "have, Welch's where they have none in common; factors are of geometric means. One seed "
        f"has no interval.{_chance(found, quantities)}"
    )
    return kit.table(heads, rows) + note


def _chance(found: Comparison, quantities: Sequence[Quantity]) -> str:
    """How many intervals of differences there are, and that some miss the truth by chance."""
    apart = [_apart(q, arm, found.baseline) for q in quantities for arm in found.others]
    count = sum(one is not None and not math.isnan(one.low) for one in apart)
    if not count:
        return ""
    compared = "1 comparison" if count == 1 else f"{count} comparisons"
    return f" These are {compared} at 95 %: one in 20 is off by chance alone."


def _cell(quantity: Quantity, arm: Arm, baseline: Arm) -> Markup:
    values = arm.values(quantity.of)
    if not values:
        return Markup("-")
    found = interval([*values.values()])
    text = quantity.show(found.mean)
    if found.high > found.mean:
        text += f" \u00b1 {quantity.show(found.high - found.mean)}"
    return Markup("{}<small>{}</small>").format(text, _against(quantity, arm, baseline))


def _against(quantity: Quantity, arm: Arm, baseline: Arm) -> str:
    found = None if arm is baseline else _apart(quantity, arm, baseline)
    if found is None:
        return ""
    if quantity.ratio:
        return f"{found.mean:.2f}\u00d7{_range(found, '.2f', ' ({})')}"
    return _signed(found)


def _apart(quantity: Quantity, arm: Arm, baseline: Arm) -> Interval | None:
    """The difference of two arms, or their factor; None where one has no value."""
    compared = ratio if quantity.ratio else difference
    return compared(arm.values(quantity.of), baseline.values(quantity.of))


def _signed(found: Interval) -> str:
    return f"{found.mean:+.2g}{_range(found, '+.2g', ' ({})')}"


def _range(found: Interval, spec: str, form: str = "{}") -> str:
    """The ends of an interval, or nothing where there is none or it has no width."""
    if math.isnan(found.low) or found.low == found.high:
        return ""
    return form.format(f"{found.low:{spec}} to {found.high:{spec}}")


def _mean(quantity: Quantity, arm: Arm) -> str:
    return quantity.show(fmean(arm.values(quantity.of).values()))


def _configuration(arms: Sequence[Arm]) -> Markup:
    rows = configuration_differences(arms)
    if not rows:
        return kit.prose("Nothing but the seed.")
    return kit.table(["key", *(arm.name for arm in arms)], [[k, *v] for k, v in rows.items()])


def _checks(arms: Sequence[Arm]) -> Iterator[Markup]:
    for arm in arms:
        for run in arm.runs:
            verdict = judge(run)
            title = f"{arm.called(run)}: {verdict.word} ({run.path})"
            yield kit.fold(title, check_list(verdict.checks))


def _environments(found: Comparison) -> Markup:
    named = [(arm.called(run), run.environment) for arm in found.arms for run in arm.runs]
    known = [(name, environment) for name, environment in named if environment]
    unknown = [name for name, environment in named if not environment]
    said = "" if not unknown else f" Not recorded, since they have not ended: {_list(unknown)}."
    rows = differences([environment for _, environment in known])
    if not rows:
        return kit.prose(f"All whose machine is recorded ran on the same one.{said}")
    heads = ["fact", *(name for name, _ in known)]
    return kit.table(heads, [[k, *v] for k, v in rows.items()]) + kit.prose(said)


def _commands(found: Comparison) -> Iterator[Markup]:
    missing = "not recorded, the run has not ended"
    yield kit.code("\n".join(run.command or f"# {run.path}: {missing}" for run in found.runs))


def _data(found: Comparison) -> Markup:
    held = [
        {"arm": arm.name, "folder": str(run.path), "config": run.config}
        | {"metrics": columns_of(run.metrics)}
        for arm in found.arms
        for run in arm.runs
    ]
    link = kit.download("comparison.json", json.dumps(held), "Download all metrics as JSON")
    return kit.prose(link + ": a list of runs with arm, configuration and metrics by name.")


def _named(arm: Arm) -> Markup:
    return kit.swatch(paint(arm.colour), f"{arm.name}, {_seeds(arm)}")


def _seeds(arm: Arm) -> str:
    return "1 seed" if len(arm.runs) == 1 else f"{len(arm.runs)} seeds"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"
