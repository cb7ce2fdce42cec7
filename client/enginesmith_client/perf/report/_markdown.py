"""A report as Markdown: verdict first, tables, no pictures. For the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

from enginesmith_client.perf._quantities import NOTHING
from enginesmith_client.perf.report._model import Code, Report, Section, Statement, Table
from enginesmith_client.perf.report._plots import Tone

_SIGNS: Mapping[Tone, str] = {
    "good": "OK",
    "warning": "WARNING",
    "bad": "BROKEN",
    "void": "VOID",
    "plain": "NOTE",
}


def markdown_of(report: Report) -> str:
    """GitHub's Markdown. What the server or the user named is escaped."""
    lines = [f"# {_text(report.title)}", "", _text(report.subtitle), ""]
    lines += [_statement(statement) for statement in (*report.verdict, *report.reasons)]
    if report.tiles:
        rows = tuple((tile.name, tile.value, tile.note) for tile in report.tiles)
        lines += ["", *_table(Table("", ("", "", ""), rows), void=report.void)]
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines) + "\n"


def _section(section: Section) -> Iterable[str]:
    if not (section.words or section.statements or section.tables or section.codes):
        return  # Nothing but plots.
    yield from ("", f"## {_text(section.title)}")
    for words in section.words:
        yield from ("", _text(words))
    if section.statements:
        yield ""
        yield from map(_statement, section.statements)
    for table in section.tables:
        yield ""
        if len(section.tables) > 1:
            yield from (f"### {_text(table.caption)}", "")
        yield from _table(table, void=section.void)
    for code in section.codes:
        yield from ("", f"### {_text(code.title)}", "", *_code(code))


def _statement(statement: Statement) -> str:
    return f"- **{_SIGNS[statement.tone]}** {_text(statement.words)}"


def _table(table: Table, *, void: bool) -> Iterable[str]:
    aligned = "---" if table.words else "---:"
    yield _row(map(_text, table.columns))
    yield _row("---" if number == 0 else aligned for number, _ in enumerate(table.columns))
    for number, (name, *cells) in enumerate(table.rows):
        crossed = void or number in table.void_rows
        yield _row((_text(name), *(_cell(cell, crossed) for cell in cells)))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: str, crossed: bool) -> str:
    return f"~~{_text(cell)}~~" if crossed and cell not in ("", NOTHING) else _text(cell)


def _code(code: Code) -> Iterable[str]:
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (fence, *code.text.rstrip("\n").splitlines(), fence)


def _text(words: str) -> str:
    """One line in which nothing is markup."""
    line = " ".join(words.split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(line, quote=False))
