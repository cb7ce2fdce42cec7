"""SVG elements as text. Everything that is passed in is escaped; colours are classes, so that the page's style decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

WIDTH = 560.0
"""Of every drawing, in its own units."""
LETTER = 7.6
"""A little more than the mean width of a letter in the size that the style gives: text cannot be measured here."""
_MARKUP = "http://www.w3.org/2000/svg"


def element(name: str, *content: str, **attributes: str | float) -> str:
    """One element around ``content``, which is markup already. ``class_`` is class, ``_`` in names is ``-``."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items()
    )
    inner = "".join(content)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def text(words: str, x: float, y: float, *, class_: str = "", anchor: str = "start") -> str:
    """A line of text, escaped."""
    return element("text", escape(words), x=x, y=y, class_=class_, text_anchor=anchor)


def drawing(words: str, width: float, height: float, *content: str) -> str:
    """An ``<svg>`` that is as wide as its place; ``words`` is what it says to those who cannot see it."""
    return element(
        "svg",
        *content,
        xmlns=_MARKUP,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=words,
        class_="chart",
    )


def tooltip(words: str) -> str:
    """What its parent says when it is pointed at."""
    return element("title", escape(words))


def path(points: Iterable[tuple[float, float]]) -> str:
    """The ``d`` of straight lines from point to point."""
    return "".join(
        f"{'L' if number else 'M'}{_number(x)} {_number(y)}" for number, (x, y) in enumerate(points)
    )


def stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of a line that holds each value until the next."""
    corners = list(points[:1])
    for (_, y), (next_x, next_y) in pairwise(points):
        corners += [(next_x, y), (next_x, next_y)]
    return corners


def _attribute(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
