"""The kit of pages: text is escaped, sources are shown, figures are text and follow the page."""

from __future__ import annotations

import re

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from fp8rl import plots
from fp8rl.report import page as kit
from fp8rl.report.figures import PAINTS, figure, svg
from fp8rl.report.glossary import UNDEFINED, definition, groups
from fp8rl.report.page import Fact, Page, Source
from tests.fp8rl.report_runs import PageText

SOURCE = Source("what <it> is", "a & b", ("one/key",), "3 steps", "a <paper>")
NASTY = "<u>&\"'"


def test_text_is_escaped_wherever_it_goes_in() -> None:
    page = Page(NASTY, NASTY)
    page.add(kit.notice(NASTY), kit.answer(NASTY, "good", NASTY, NASTY), kit.code(NASTY))
    page.add(kit.facts(NASTY, [Fact(NASTY, NASTY, NASTY, SOURCE)]))
    page.add(kit.check_row("bad", NASTY, NASTY, NASTY, SOURCE), kit.fold(NASTY, kit.prose(NASTY)))
    page.section(NASTY, kit.table([NASTY], [[NASTY, kit.explained(NASTY, SOURCE)]]))
    html = page.html()
    assert NASTY not in html and "<u>" not in html
    assert PageText(html).text.count(NASTY) == 21


def test_a_source_is_shown_whole_and_what_it_lacks_is_not() -> None:
    terms = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", str(kit.provenance(SOURCE)))
    assert [(name, PageText(text).text) for name, text in terms] == [
        ("means", "what <it> is"),
        ("formula", "a & b"),
        ("read from", "one/key in metrics.jsonl"),
        ("over", "3 steps"),
        ("reference", "a <paper>"),
    ]
    assert PageText(str(kit.provenance(Source("alone")))).text == "meansalone"


def test_a_figure_is_real_text_in_the_colours_of_the_page() -> None:
    with rc_context(plots.STYLE):
        drawing = Figure(figsize=(4, 3))
        axes = drawing.subplots()
        axes.plot([1, 2], [3, 4], color=plots.BLUE, label="a line")
        axes.legend()
    made = figure(drawing, "Title", "note", SOURCE)
    assert ">a line</text>" in made
    assert "var(--blue)" in made and plots.BLUE.lower() not in made
    assert "#000000" not in made and "<metadata>" not in made
    assert isinstance(made, Markup) and svg(drawing, "Title") == svg(drawing, "Title")


def test_every_colour_of_the_pictures_has_one_in_the_light_and_one_in_the_dark() -> None:
    css = str(Page("x").html())
    for paint in {paint for paint in PAINTS.values() if paint.startswith("var")}:
        name = re.escape(paint.removeprefix("var(").removesuffix(")"))
        assert len(re.findall(rf"{name}: #", css)) == 2, paint
    assert set(plots.PHASE_COLOURS.values()) <= set(PAINTS)


def test_names_are_grouped_and_defined_or_said_not_to_be() -> None:
    assert groups(["time/step", "odd", "kv/tokens"]) == [
        ("KV cache", ["kv/tokens"]),
        ("Time", ["time/step"]),
        ("Other", ["odd"]),
    ]
    assert definition("rollout_corr/k3_kl").formula == "mean(r - 1 - log r)"
    assert definition("odd").what == UNDEFINED
