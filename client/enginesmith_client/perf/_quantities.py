"""Numbers as people read them: three digits that count, in the unit that keeps them short."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["ms", "s", "per_s", "percent", "bytes", "count", "ratio", "change", "plain"]
"""What a number is of. ``change`` is a ratio that is read as a difference: 1.05 is +5%."""

NOTHING = "–"
"""Stands where there is no figure."""
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def quantity(value: float | None, unit: Unit) -> str:
    """``value`` with its unit: ``4.20 ms``, ``1.31 GiB``, ``1,204 /s``; a dash for None."""
    if value is None or not math.isfinite(value):
        return NOTHING
    match unit:
        case "ms":
            return duration(value)
        case "s":
            return duration(value * 1e3) if value else "0 s"
        case "per_s":
            return f"{significant(value)} /s"
        case "percent":
            return f"{significant(value)}%"
        case "bytes":
            return byte_size(value)
        case "count":
            return f"{round(value):,}"
        case "change":
            return change(value)
        case "ratio" | "plain":
            return significant(value)


def duration(ms: float) -> str:
    """Milliseconds in the unit that keeps the number between 1 and 1000, as far as there is one."""
    if ms == 0:
        return "0 ms"
    if abs(ms) < 1.0:
        return f"{significant(ms * 1e3)} µs"
    if abs(ms) < 999.5:
        return f"{significant(ms)} ms"
    if abs(ms) < 120e3:
        return f"{significant(ms / 1e3)} s"
    return f"{significant(ms / 60e3)} min"


def byte_size(count: float) -> str:
    """Bytes in powers of 1024."""
    for suffix in _BYTES[:-1]:
        if abs(count) < 1000:
            return f"{significant(count)} {suffix}"
        count /= 1024
    return f"{significant(count)} {_BYTES[-1]}"


def change(ratio: float) -> str:
    """How far ``ratio`` is from 1, in percent with its sign."""
    percent = (ratio - 1.0) * 100
    digits = 1 if abs(percent) < 99.5 else 0
    shown = f"{percent:+.{digits}f}%"
    return "0.0%" if shown in ("+0.0%", "-0.0%") else shown.replace("-", "−")


def significant(value: float) -> str:
    """Three digits, or all before the point."""
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}".replace("-", "−")
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    digits = 2 - math.floor(math.log10(abs(rounded))) if rounded else digits
    if digits > 6:
        return f"{value:.2e}"
    return f"{rounded:.{max(digits, 0)}f}".replace("-", "−")


def moment(started: str) -> str:
    """A time of the results (ISO 8601, UTC) as people read it: ``2026-11-23 12:19:28 UTC``."""
    return (
        f"{started.removesuffix('+00:00').replace('T', ' ')} UTC" if started.endswith("+00:00") else started
    )


def tick(value: float, unit: Unit, *, base: float = 1.0) -> str:
    """As ``quantity``, without digits that say nothing: for axes. ``base``: the unit of bytes, the same for all ticks."""
    if unit == "bytes":
        suffix = _BYTES[round(math.log(base, 1024))]
        return f"{value / base:g} {suffix}" if value else "0"
    text = quantity(value, unit)
    number, space, suffix = text.partition(" ")
    percent = "%" if number.endswith("%") else ""
    number = number.removesuffix("%")
    if "." in number and "e" not in number:
        number = number.rstrip("0").rstrip(".")
    if unit == "per_s":
        return number
    return f"{number}{percent}{space}{suffix}"
