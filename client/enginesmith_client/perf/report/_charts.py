"""SVG of a plot. Colours, dark mode and print are the page's style: shapes here only have classes.

Series differ by dashes too, not only by colour; every point says its values in a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from enginesmith_client.perf._quantities import quantity, tick
from enginesmith_client.perf.report._forest_chart import forest_of
from enginesmith_client.perf.report._plots import (
    Axis,
    Bars,
    Forest,
    Histogram,
    Lines,
    Mark,
    Plot,
    Series,
    Span,
)
from enginesmith_client.perf.report._scales import Scale, linear_scale, log_scale
from enginesmith_client.perf.report._svg import LETTER, WIDTH, drawing, element, path, stairs, text, tooltip

HEIGHT = 310.0
_LEFT, _RIGHT, _BOTTOM = 78.0, 18.0, 46.0
_LINE = 17.0
_RING = 7.0
_ABOVE_DOT, _ABOVE_RING = 8.0, 12.0
"""How far the label of a point is above it, in pixels; a ring must not go through it."""
_MOST_DOTS = 24
"""Lines of more points are drawn without dots."""
_MOST_TOOLTIPS = 60


def svg_of(plot: Plot) -> str:
    """The drawing of ``plot``, as one ``<svg>`` with ``role=img`` and the plot's words as its text."""
    match plot:
        case Lines():
            return _lines(plot)
        case Histogram():
            return _histogram(plot)
        case Bars():
            return _bars(plot)
        case Forest():
            return forest_of(plot)


@dataclass(frozen=True)
class _Label:
    """Something above the plot: a word of the legend or of a mark."""

    x: float
    words: str
    class_: str


@dataclass(frozen=True)
class _Frame:
    """Where the inside of a plot is, and its two scales."""

    top: float
    x: Scale
    y: Scale

    @property
    def floor(self) -> float:
        return HEIGHT - _BOTTOM


def _svg(plot: Lines | Histogram | Bars, *content: str) -> str:
    return drawing(f"{plot.title}. {plot.words}", WIDTH, HEIGHT, *content)


def _scale(axis: Axis, values: Iterable[float], *, first: float, last: float) -> Scale:
    if axis.ends is not None:
        return Scale(*axis.ends, first, last, log=axis.log)
    if axis.log:
        return log_scale(values, first=first, last=last)
    binary = axis.unit == "bytes"
    return linear_scale(values, first=first, last=last, from_zero=axis.from_zero, binary=binary)


def _lines(plot: Lines) -> str:
    legend = _legend(plot.series, plot.spans)
    xs = [x for series in plot.series for x in series.x] + [spot.x for spot in plot.spots]
    ys = [y for series in plot.series for y in series.y if y is not None] + [spot.y for spot in plot.spots]
    xs += [mark.value for mark in plot.marks if mark.along == "x"]
    ys += [mark.value for mark in plot.marks if mark.along == "y"]
    x = _scale(plot.x, xs, first=_LEFT, last=WIDTH - _RIGHT)
    labels, rows = _rows(_mark_labels(plot.marks, x))
    top = 12 + _LINE * rows + 21 * bool(legend)
    frame = _Frame(top, x, _scale(plot.y, ys, first=HEIGHT - _BOTTOM, last=top))
    return _svg(
        plot,
        *(_span(frame, span) for span in plot.spans),
        _axes(frame, plot.x, plot.y),
        *(_mark(frame, mark) for mark in plot.marks),
        *(_series(frame, plot, number) for number in range(len(plot.series))),
        *(
            element(
                "circle",
                tooltip(spot.label),
                cx=x(spot.x),
                cy=frame.y(spot.y),
                r=_RING,
                class_=f"spot tone-{spot.tone}",
            )
            + text(
                spot.label,
                *_beside(x(spot.x), frame.y(spot.y), spot.label),
                class_=f"spot-label ink-{spot.tone}",
            )
            for spot in plot.spots
        ),
        legend,
        *(_at_row(label, row, first=12 + 21 * bool(legend)) for label, row in labels),
    )


def _series(frame: _Frame, plot: Lines, number: int) -> str:
    series = plot.series[number]
    pieces: list[str] = []
    for piece in _pieces(series):
        points = [(frame.x(x), frame.y(y)) for x, y in piece]
        corners = stairs(points) if series.steps else points
        pieces.append(element("path", d=path(corners), class_=f"line series-{number}"))
    few = len(series.x) <= _MOST_DOTS
    ringed = {(spot.x, spot.y) for spot in plot.spots}
    for place, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if y is None or not (few or place % math.ceil(len(series.x) / _MOST_TOOLTIPS) == 0):
            continue
        said = series.labels[place] if series.labels else _values(plot, series, x, y)
        class_ = f"dot series-{number}" if few and not series.steps else "hover"
        pieces.append(
            element("circle", tooltip(said), cx=frame.x(x), cy=frame.y(y), r=3.2 if few else 6, class_=class_)
        )
        if series.short_labels:
            pieces.append(
                text(
                    series.short_labels[place],
                    frame.x(x),
                    frame.y(y) - (_ABOVE_RING if (x, y) in ringed else _ABOVE_DOT),
                    class_="point",
                    anchor="middle",
                )
            )
    return "".join(pieces)


def _values(plot: Lines, series: Series, x: float, y: float) -> str:
    return f"{series.name}: {quantity(y, plot.y.unit)} at {quantity(x, plot.x.unit)}"


def _pieces(series: Series) -> list[list[tuple[float, float]]]:
    """Cut at the gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _legend(series: Sequence[Series], spans: Sequence[Span]) -> str:
    """What lines and shades are; nothing for a single line."""
    x, parts = _LEFT, []
    for number, one in enumerate(series if len(series) > 1 else ()):
        parts.append(element("path", d=path([(x, 14), (x + 24, 14)]), class_=f"line series-{number}"))
        parts.append(text(one.name, x + 30, 18, class_="legend"))
        x += 30 + len(one.name) * LETTER + 22
    for span in spans:
        parts.append(element("rect", x=x, y=8, width=24, height=12, class_="span"))
        parts.append(text(span.label, x + 30, 18, class_="legend"))
        x += 30 + len(span.label) * LETTER + 22
    return "".join(parts)


def _axes(frame: _Frame, x: Axis, y: Axis) -> str:
    parts = [_ground(frame, x.label, y)]
    for value in _apart(frame.x, x):
        at = frame.x(value)
        parts.append(element("path", d=path([(at, frame.floor), (at, frame.floor + 5)]), class_="axis"))
        parts.append(
            text(tick(value, x.unit, base=frame.x.base), at, frame.floor + 19, class_="tick", anchor="middle")
        )
    return "".join(parts)


def _ground(frame: _Frame, x_label: str, y: Axis) -> str:
    """All of the axes but the ticks of x."""
    parts = []
    for value in frame.y.ticks(6):
        at = frame.y(value)
        parts.append(element("path", d=path([(_LEFT, at), (WIDTH - _RIGHT, at)]), class_="grid"))
        parts.append(
            text(tick(value, y.unit, base=frame.y.base), _LEFT - 8, at + 4, class_="tick", anchor="end")
        )
    parts.append(
        element("path", d=path([(_LEFT, frame.floor), (WIDTH - _RIGHT, frame.floor)]), class_="axis")
    )
    parts.append(
        text(x_label, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, class_="axis-label", anchor="middle")
    )
    turned = f"translate(11 {(frame.top + frame.floor) / 2:.0f}) rotate(-90)"
    parts.append(
        element("text", escape(y.label), transform=turned, class_="axis-label", text_anchor="middle")
    )
    return "".join(parts)


def _apart(scale: Scale, axis: Axis) -> list[float]:
    """Ticks whose words do not touch or leave the drawing."""
    chosen: list[float] = []
    end = 0.0
    for value in scale.ticks(7):
        half = len(tick(value, axis.unit, base=scale.base)) * LETTER / 2
        if scale(value) - half > end and scale(value) + half < WIDTH:
            chosen.append(value)
            end = scale(value) + half + 8
    return chosen


def _mark_labels(marks: Sequence[Mark], x: Scale) -> list[_Label]:
    return [
        _Label(x(mark.value), mark.label, f"mark-label ink-{mark.tone}")
        for mark in marks
        if mark.along == "x"
    ]


def _mark(frame: _Frame, mark: Mark) -> str:
    if mark.along == "x":
        at = frame.x(mark.value)
        return element(
            "path",
            tooltip(mark.label),
            d=path([(at, frame.top - 3), (at, frame.floor)]),
            class_=f"mark tone-{mark.tone}",
        )
    at = frame.y(mark.value)
    line = path([(_LEFT, at), (WIDTH - _RIGHT, at)])
    return element("path", tooltip(mark.label), d=line, class_=f"mark tone-{mark.tone}") + text(
        mark.label, _LEFT + 6, at - 5, class_=f"mark-label ink-{mark.tone}"
    )


def _rows(labels: Sequence[_Label]) -> tuple[list[tuple[_Label, int]], int]:
    """Labels above the plot, each in the first row where it does not touch another."""
    ends: list[float] = []
    placed: list[tuple[_Label, int]] = []
    for label in sorted(labels, key=lambda one: one.x):
        half = len(label.words) * LETTER / 2
        middle = min(max(label.x, half + 2), WIDTH - half - 2)
        row = next((row for row, end in enumerate(ends) if middle - half > end), len(ends))
        if row == len(ends):
            ends.append(0.0)
        ends[row] = middle + half + 6
        placed.append((_Label(middle, label.words, label.class_), row))
    return placed, len(ends)


def _at_row(label: _Label, row: int, *, first: float) -> str:
    return text(label.words, label.x, first + _LINE * row, class_=label.class_, anchor="middle")


def _span(frame: _Frame, span: Span) -> str:
    left, right = frame.x(span.low), frame.x(span.high)
    words, height = tooltip(span.label), frame.floor - frame.top
    return element(
        "rect", words, x=left, y=frame.top, width=max(right - left, 1), height=height, class_="span"
    )


def _beside(x: float, y: float, words: str) -> tuple[float, float]:
    """Where a label of a point stays within the drawing."""
    length = len(words) * LETTER
    return (x + 11, y + 4) if x + 11 + length < WIDTH else (x - 11 - length, y + 4)


def _histogram(plot: Histogram) -> str:
    total = sum(plot.counts) or 1
    shares = [100 * count / total for count in plot.counts]
    marked = [mark.value for mark in plot.marks]
    values = [*plot.edges, *(mark for mark in marked if not plot.x.log or mark > 0)]
    x = _scale(plot.x, values, first=_LEFT, last=WIDTH - _RIGHT)
    labels, rows = _rows(_mark_labels(plot.marks, x))
    frame = _Frame(12 + _LINE * rows, x, linear_scale(shares, first=HEIGHT - _BOTTOM, last=12 + _LINE * rows))
    bars = []
    for low, high, count, share in zip(plot.edges, plot.edges[1:], plot.counts, shares, strict=False):
        said = f"{quantity(low, plot.x.unit)} to {quantity(high, plot.x.unit)}: {count:,} ({share:.1f}%)"
        bars.append(_bar(frame, x(low), x(high), share, said))
    return _svg(
        plot,
        _axes(frame, plot.x, Axis("share", "percent")),
        *bars,
        *(_mark(frame, mark) for mark in plot.marks),
        *(_at_row(label, row, first=12) for label, row in labels),
    )


def _bar(frame: _Frame, left: float, right: float, value: float, said: str) -> str:
    top = frame.y(value)
    return element(
        "rect",
        tooltip(said),
        x=left + 0.5,
        y=top,
        width=max(right - left - 1, 0.8),
        height=frame.floor - top,
        class_="bar",
    )


def _bars(plot: Bars) -> str:
    top = 12.0
    places = Scale(0.0, float(max(len(plot.names), 1)), _LEFT, WIDTH - _RIGHT)
    frame = _Frame(top, places, _scale(plot.y, plot.values, first=HEIGHT - _BOTTOM, last=top))
    room = (WIDTH - _RIGHT - _LEFT) / max(len(plot.names), 1)
    every = math.ceil(max((len(name) for name in plot.names), default=1) * (LETTER + 2) / room)
    parts = []
    for place, (name, value) in enumerate(zip(plot.names, plot.values, strict=True)):
        said = f"{name}: {quantity(value, plot.y.unit)}"
        width = min(room * 0.7, 60.0)
        middle = places(place + 0.5)
        parts.append(_bar(frame, middle - width / 2, middle + width / 2, value, said))
        if place % every == 0:
            parts.append(text(name, middle, frame.floor + 19, class_="tick", anchor="middle"))
    return _svg(plot, _ground(frame, plot.x_label, plot.y), *parts)
