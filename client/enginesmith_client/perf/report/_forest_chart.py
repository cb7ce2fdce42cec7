"""SVG of a forest plot: one interval a row, around the line of no difference."""

from __future__ import annotations

import math

from enginesmith_client.perf._quantities import quantity
from enginesmith_client.perf.report._plots import Forest, ForestRow
from enginesmith_client.perf.report._scales import Scale
from enginesmith_client.perf.report._svg import WIDTH, drawing, element, path, text, tooltip

_LEFT, _RIGHT = 184.0, WIDTH - 152.0
_ROW = 34.0


def forest_of(plot: Forest) -> str:
    """The drawing; as high as it has rows."""
    left, right = _LEFT, _RIGHT
    ends = [value for row in plot.rows for value in (row.low, row.high, row.band_low, row.band_high)]
    reach = max((abs(math.log(value)) for value in ends if value > 0), default=0.05)
    scale = Scale(math.exp(-reach * 1.1), math.exp(reach * 1.1), left, right, log=True)
    floor = 24 + _ROW * len(plot.rows)
    height = floor + 44
    parts = [_band(row, number, scale) for number, row in enumerate(plot.rows)]
    parts.append(element("path", d=path([(scale(1.0), 18), (scale(1.0), floor)]), class_="axis"))
    for value in _change_ticks(scale):
        at = scale(value)
        parts.append(element("path", d=path([(at, floor), (at, floor + 5)]), class_="axis"))
        parts.append(text(_whole_change(value), at, floor + 19, class_="tick", anchor="middle"))
    parts.append(element("path", d=path([(left, floor), (right, floor)]), class_="axis"))
    parts.append(text("B against A", (left + right) / 2, height - 6, class_="axis-label", anchor="middle"))
    parts += [_row(row, number, scale) for number, row in enumerate(plot.rows)]
    return drawing(f"{plot.title}. {plot.words}", WIDTH, height, *parts)


def _band(row: ForestRow, number: int, scale: Scale) -> str:
    low, high = scale(row.band_low), scale(row.band_high)
    words = tooltip("differences too small to matter")
    return element("rect", words, x=low, y=24 + _ROW * number, width=high - low, height=_ROW, class_="span")


def _row(row: ForestRow, number: int, scale: Scale) -> str:
    y = 24 + _ROW * (number + 0.5)
    change = quantity(row.ratio, "change")
    said = f"{row.name}: {change} ({quantity(row.low, 'change')} to {quantity(row.high, 'change')}), {row.verdict}"
    low, middle, high = scale(row.low), scale(row.ratio), scale(row.high)
    line = (
        path([(low, y), (high, y)])
        + path([(low, y - 4), (low, y + 4)])
        + path([(high, y - 4), (high, y + 4)])
    )
    return element(
        "g",
        tooltip(said),
        text(row.name, 4, y + (-3 if row.note else 4), class_="forest-name"),
        text(row.note, 4, y + 12, class_="tick") if row.note else "",
        element("path", d=line, class_=f"interval tone-{row.tone}"),
        element("rect", x=middle - 4, y=y - 4, width=8, height=8, class_=f"estimate fill-{row.tone}"),
        text(
            f"{change}  {row.verdict}", WIDTH - 4, y + 4, class_=f"forest-value ink-{row.tone}", anchor="end"
        ),
    )


def _change_ticks(scale: Scale) -> list[float]:
    span = (scale.high - scale.low) * 100
    step = next((step for step in (0.5, 1, 2, 5, 10, 20, 50) if span / step <= 6), 100)
    first, last = math.ceil((scale.low - 1) * 100 / step), math.floor((scale.high - 1) * 100 / step)
    return [1 + number * step / 100 for number in range(first, last + 1) if 1 + number * step / 100 > 0]


def _whole_change(ratio: float) -> str:
    return "same" if abs(ratio - 1) < 1e-9 else f"{(ratio - 1) * 100:+g}%".replace("-", "−")
