"""Plots as data: what is drawn, not how. ``_charts`` draws them; the JSON of a report holds them as they are.

Every plot has ``words``: what it shows to those who cannot see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from enginesmith_client.perf._quantities import Unit

Tone: TypeAlias = Literal["plain", "good", "warning", "bad", "void"]


@dataclass(frozen=True)
class Axis:
    """One of the two."""

    label: str
    unit: Unit
    log: bool = False
    from_zero: bool = True
    """Of linear axes."""
    ends: tuple[float, float] | None = None
    """Where it begins and ends; None: at round values around what is drawn."""


@dataclass(frozen=True)
class Series:
    """A line through points. ``y`` is None where the line has a gap."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    labels: tuple[str, ...] = ()
    """What points say when they are pointed at; empty: their values."""
    short_labels: tuple[str, ...] = ()
    """Written beside the points."""
    steps: bool = False
    """A value holds until the next: the line has stairs."""


@dataclass(frozen=True)
class Mark:
    """A value that the eye needs: a line across the plot."""

    along: Literal["x", "y"]
    value: float
    label: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Spot:
    """One point that has a name."""

    x: float
    y: float
    label: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Span:
    """A part of the x axis: the measured window."""

    low: float
    high: float
    label: str


@dataclass(frozen=True)
class Lines:
    """Lines over two axes."""

    title: str
    words: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    spots: tuple[Spot, ...] = ()
    spans: tuple[Span, ...] = ()
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True)
class Histogram:
    """Bars between edges. ``edges`` has one value more than ``counts``."""

    title: str
    words: str
    x: Axis
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    marks: tuple[Mark, ...] = ()
    kind: Literal["histogram"] = "histogram"


@dataclass(frozen=True)
class Bars:
    """A bar for each name."""

    title: str
    words: str
    x_label: str
    y: Axis
    names: tuple[str, ...]
    values: tuple[float, ...]
    kind: Literal["bars"] = "bars"


@dataclass(frozen=True)
class ForestRow:
    """One interval: B as a multiple of A."""

    name: str
    ratio: float
    low: float
    high: float
    verdict: str
    tone: Tone
    band_low: float
    """From here to ``band_high`` a difference is too small to matter."""
    band_high: float
    note: str = ""
    """``less is better``."""


@dataclass(frozen=True)
class Forest:
    """Intervals around 1, each with its band of no importance."""

    title: str
    words: str
    rows: tuple[ForestRow, ...]
    kind: Literal["forest"] = "forest"


Plot: TypeAlias = Lines | Histogram | Bars | Forest
