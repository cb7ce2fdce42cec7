"""What an inspection found: facts and lists, as JSON with every row and as tables for people.

A figure whose name ends in ``bytes`` is a size. Knows nothing of formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enginesmith.report_parts import bytes_text

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_ROWS = 24
"""Rows of a list that people are shown; JSON has all."""
_ABSENT = "-"


@dataclass(frozen=True)
class Listing:
    """Rows of one kind. Every row has every column, in one order."""

    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Inspection:
    """What one thing is and holds."""

    kind: str
    path: Path
    facts: Mapping[str, Any]
    listings: tuple[Listing, ...] = ()
    parts: tuple[Inspection, ...] = field(default=())
    """What is inside of it and was looked into too."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; lists by their title."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            **self.facts,
            **{
                listing.title.replace(" ", "_"): [dict(row) for row in listing.rows]
                for listing in self.listings
            },
            **({"parts": [part.as_json() for part in self.parts]} if self.parts else {}),
        }

    def as_tables(self) -> Iterator[Table]:
        """Tables for people: the facts, the lists, then the parts."""
        yield _facts_table(self)
        for listing in self.listings:
            if listing.rows:
                yield _listing_table(listing)
        for part in self.parts:
            yield from part.as_tables()


def _facts_table(inspection: Inspection) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=inspection.kind, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    # Text, because a string is markup to rich, and shapes in brackets would vanish.
    for name, value in _lines({"path": str(inspection.path), **inspection.facts}):
        table.add_row(_heading(name), Text(shown(name, value)))
    return table


def _listing_table(listing: Listing) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=listing.title, title_justify="left")
    for name, value in listing.rows[0].items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        table.add_column(_heading(name), justify="right" if is_number else "left", overflow="fold")
    for row in listing.rows[:SHOWN_ROWS]:
        table.add_row(*(Text(shown(name, value)) for name, value in row.items()))
    if (more := len(listing.rows) - SHOWN_ROWS) > 0:
        table.caption = f"and {more} more; --json has all"
    return table


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The facts, with what has structure inside spread over lines of its own."""
    for name, value in facts.items():
        if isinstance(value, Mapping) and any(isinstance(one, (Mapping, list)) for one in value.values()):
            yield from ((f"{name}.{inner}", one) for inner, one in _lines(value))
        else:
            yield name, value


def _heading(name: str) -> str:
    if "." in name:
        return name  # A key of a document, as the document spells it.
    return "size" if name == "bytes" else name.removesuffix("_bytes").replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value for people. ``name`` tells whether it is a size."""
    if value is None or value in ("", [], {}, ()):
        return _ABSENT
    if name.endswith("bytes") and isinstance(value, (int, float)):
        return bytes_text(value) or _ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(str(key), one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        if name.endswith("shape") or all(isinstance(one, int) for one in value):
            return f"[{', '.join(map(str, value))}]"
        return ", ".join(shown("", one) for one in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).lower() if isinstance(value, bool) else str(value)
