"""Code as lines, laid out as ``ruff format`` leaves it: what could get long stands on lines of its own behind a comma. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Code:
    """Lines, and the names that they need imported."""

    lines: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)

    def add(self, *lines: str, uses: Iterable[str] = ()) -> None:
        self.lines += lines
        self.uses |= set(uses)

    def exploded(self, opening: str, items: Iterable[str], closing: str, *, indent: int) -> None:
        """``items`` on lines of their own, each with a comma."""
        space = " " * indent
        self.add(space + opening, *(f"{space}    {item}," for item in items), space + closing)

    def define(self, opening: str, parameters: Iterable[str], returns: str) -> None:
        """The head of a method."""
        self.exploded(opening, parameters, f") -> {returns}:", indent=4)


@dataclass(frozen=True)
class Flavour:
    """What differs between the classes for threads and for tasks."""

    prefix: str
    client: str
    define: str
    wait: str

    @property
    def iterator(self) -> str:
        return f"{self.prefix}Iterator"


SYNC = Flavour("", "Client", "def", "")
ASYNC = Flavour("Async", "AsyncClient", "async def", "await ")
