"""A report as data, before it is a page: what is said, in which order. HTML, Markdown and JSON are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from enginesmith_client.perf.report._plots import Plot, Tone

Kind: TypeAlias = Literal["run", "sweep", "suite", "comparison"]


@dataclass(frozen=True)
class Statement:
    """A sentence of the verdict."""

    tone: Tone
    words: str


@dataclass(frozen=True)
class Tile:
    """One of the few figures that stand at the top."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text. The first cell of each row is its heading; the others are numbers unless ``words``."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    void_rows: frozenset[int] = frozenset()
    """Rows whose figures must not be used."""


@dataclass(frozen=True)
class Code:
    """Text to be copied."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """Under one heading, in the order of the fields."""

    title: str
    words: tuple[str, ...] = ()
    statements: tuple[Statement, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    codes: tuple[Code, ...] = ()
    void: bool = False
    """Every figure in it is crossed out."""


@dataclass(frozen=True)
class Report:
    """The whole."""

    kind: Kind
    title: str
    subtitle: str
    """What was measured, where and when."""
    verdict: tuple[Statement, ...]
    """May the numbers be believed, and was the promise kept: first of all."""
    reasons: tuple[Statement, ...]
    """What the checks found."""
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    results: Mapping[str, Any]
    """The saved documents that the report was made from, as they are."""
    void: bool = False
    """None of the figures says anything about the server."""

    @property
    def tone(self) -> Tone:
        """Of the worst statement."""
        order: tuple[Tone, ...] = ("void", "bad", "warning", "good")
        tones = {statement.tone for statement in self.verdict}
        return next((tone for tone in order if tone in tones), "plain")
