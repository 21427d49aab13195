"""The kit that pages are made of: every part is a function that returns a piece of HTML.

    page = Page("FP8 weights and KV cache", "100 of 100 steps, seed 0")
    page.add(answer("Is it safe?", "good", "Safe", "All checks passed."))
    page.section("Curves", figure_row([figure(drawing, "Reward", source)]))
    path.write_text(page.html())

A page is one file: no network, no scripts, no fonts but the reader's. It is readable on a phone, in
the dark and on paper. A table that cannot shrink scrolls in a box of its own.

Text goes in as text and is escaped; what these functions return is ``Markup`` and is not escaped
again. Where a number comes from is one click away: a number is shown as a ``<details>`` whose
inside is its ``Source``. Matplotlib figures become inline SVG with real text, in the page's colours
(``figures.py``).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, Self

from markupsafe import Markup, escape

State = Literal["good", "watch", "bad", "unknown"]
MARKS = {"good": "\u2713", "watch": "!", "bad": "\u2715", "unknown": "?"}
SPOKEN = {"good": "passed", "watch": "watch", "bad": "failed", "unknown": "unknown"}


@dataclass(frozen=True)
class Source:
    """Where a number comes from.

    what: what it means, in words. formula: how it is computed. keys: the metrics it is made of.
    over: the steps, in words. reference: where its threshold or definition is from. file: what
    holds the metrics.
    """

    what: str
    formula: str = ""
    keys: tuple[str, ...] = ()
    over: str = ""
    reference: str = ""
    file: str = "metrics.jsonl"


@dataclass(frozen=True)
class Fact:
    """A number worth a line of its own: ``number`` large, ``label`` beside it, ``remark`` below."""

    number: str
    label: str
    remark: str
    source: Source


class Page:
    """A page under construction; ``add`` and ``section`` return it, ``html`` is the file."""

    def __init__(self, title: str, *subtitles: str) -> None:
        """Begin with a heading and lines below it."""
        self._title = title
        lines = Markup().join(Markup("<p>{}</p>").format(line) for line in subtitles)
        self._parts = [Markup("<header><h1>{}</h1>{}</header>").format(title, lines)]

    def add(self, *parts: Markup) -> Self:
        """Append parts."""
        self._parts += parts
        return self

    def section(self, heading: str, *parts: Markup) -> Self:
        """Append a heading and what it is of."""
        text = Markup("<section><h2>{}</h2>\n{}</section>")
        return self.add(text.format(heading, Markup("\n").join(parts)))

    def html(self) -> str:
        """The whole file."""
        text = Markup(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            "<title>fp8rl: {}</title>\n<style>\n{}</style>\n</head>\n<body>\n{}\n</body>\n</html>\n"
        )
        return str(text.format(self._title, _css(), Markup("\n").join(self._parts)))


def answer(question: str, state: State, word: str, *sentences: str | Markup) -> Markup:
    """A question, its answer in one large word, and why."""
    text = Markup('<div class="answer {}"><h2>{}</h2><p class="word">{}</p>{}</div>')
    why = Markup().join(Markup("<p>{}</p>").format(sentence) for sentence in sentences)
    return text.format(state, question, word, why)


def columns(*parts: Markup) -> Markup:
    """Parts side by side where there is room, else one below the other."""
    cells = Markup().join(Markup("<div>{}</div>").format(part) for part in parts)
    return Markup('<div class="columns">{}</div>').format(cells)


def facts(heading: str, shown: Iterable[Fact]) -> Markup:
    """Numbers under a heading, one a row; a click on one opens its source."""
    row = Markup(
        '<details class="fact"><summary><b>{}</b><span>{}<small>{}</small></span></summary>{}'
        "</details>"
    )
    rows = [row.format(f.number, f.label, f.remark, provenance(f.source)) for f in shown]
    return Markup('<div class="facts"><h2>{}</h2>{}</div>').format(heading, Markup().join(rows))


def check_row(state: State, name: str, found: str, asks: str, source: Source) -> Markup:
    """One check: its state, what was found and what was asked for; a click opens its source."""
    text = Markup(
        '<details class="check {}"><summary><i role="img" aria-label="{}">{}</i>'
        "<b>{}</b><span>{}</span><small>{}</small></summary>{}</details>"
    )
    mark, spoken = MARKS[state], SPOKEN[state]
    return text.format(state, spoken, mark, name, found, asks, provenance(source))


def provenance(source: Source) -> Markup:
    """A source as a list of its parts."""
    read = Markup(", ").join(Markup("<code>{}</code>").format(key) for key in source.keys)
    parts: list[tuple[str, str | Markup]] = [
        ("means", source.what),
        ("formula", source.formula),
        ("read from", Markup("{} in <code>{}</code>").format(read, source.file) if read else ""),
        ("over", source.over),
        ("reference", source.reference),
    ]
    row = Markup("<dt>{}</dt><dd>{}</dd>")
    rows = Markup().join(row.format(name, text) for name, text in parts if text)
    return Markup("<dl>{}</dl>").format(rows)


def explained(text: str, source: Source) -> Markup:
    """Text that opens its source at a click, for a cell of a table."""
    shown = Markup('<details class="why"><summary>{}</summary>{}</details>')
    return shown.format(text, provenance(source))


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Markup]]) -> Markup:
    """A table in a box that scrolls sideways; the first column is of names, the others right."""
    head = Markup().join(Markup("<th>{}</th>").format(text) for text in heads)
    body = Markup("\n").join(
        Markup("<tr>{}</tr>").format(Markup().join(Markup("<td>{}</td>").format(c) for c in row))
        for row in rows
    )
    text = Markup(
        '<div class="wide"><table><thead><tr>{}</tr></thead>\n<tbody>{}</tbody></table></div>'
    )
    return text.format(head, body)


def fold(summary: str, *parts: Markup) -> Markup:
    """Parts behind one line."""
    text = Markup('<details class="fold"><summary>{}</summary>\n{}</details>')
    return text.format(summary, Markup("\n").join(parts))


def prose(text: str | Markup) -> Markup:
    """A paragraph."""
    return Markup("<p>{}</p>").format(text)


def notice(text: str | Markup) -> Markup:
    """A paragraph that must not be passed over."""
    return Markup('<p class="notice">{}</p>').format(text)


def code(text: str) -> Markup:
    """Text as it was written, in a box; lines that are too long are broken."""
    return Markup("<pre><code>{}</code></pre>").format(text)


def swatch(colour: str, text: str) -> Markup:
    """A name with the colour that it has in figures."""
    return Markup('<i class="swatch" style="background:{}"></i>{}').format(colour, escape(text))


def download(name: str, data: str, text: str) -> Markup:
    """A link that saves ``data`` as the file ``name``; the page carries it."""
    coded = base64.b64encode(data.encode()).decode()
    link = Markup('<a download="{}" href="data:application/json;base64,{}">{}</a>')
    return link.format(name, coded, text)


@cache
def _css() -> Markup:
    return Markup(files(__package__).joinpath("page.css").read_text())
