"""Which loads a sweep measures: given ones, or as the answers so far suggest. Pure: points in, the next load out.

Because the next load depends on nothing but the ladder and the points, a sweep that was interrupted finds its way again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from enginesmith_client.perf._errors import ProfileError

Axis: TypeAlias = Literal["concurrency", "rate"]

MAX_CONCURRENCY = 256
MAX_RATE_PER_S = 20_000.0
GAIN = 1.05
"""A doubled concurrency that brings less than this factor of throughput ends the climb."""
CLOSE = 1.1
"""The limit is found when the load that keeps it and the one that breaks it are as near as this factor."""
_DESCENTS = 3
_DESCENT_FACTOR = 4


class Measured(Protocol):
    """What the next load depends on."""

    @property
    def load(self) -> float:
        """Requests in flight, or per second."""

    @property
    def throughput_per_s(self) -> float:
        """Answered requests."""

    @property
    def fits(self) -> bool | None:
        """Whether the server carried the load within the SLO, as far as there is one; None: it cannot be said."""

    @property
    def usable(self) -> bool:
        """Whether its numbers say anything."""


@dataclass(frozen=True)
class Ladder:
    """The loads of a sweep."""

    axis: Axis
    values: tuple[float, ...] = ()
    """In the order in which they are measured. Empty: found on the way, by doubling from ``start``."""
    start: float | None = None
    """Of an automatic ladder. Default: 1 request in flight; half of the rate that one at a time reaches."""
    maximum: float | None = None
    """Of an automatic ladder. Default: 256 in flight, 20,000 per second."""

    def __post_init__(self) -> None:
        given = [*self.values, *(value for value in (self.start, self.maximum) if value is not None)]
        wrong = [value for value in given if not (math.isfinite(value) and value > 0)]
        if self.axis == "concurrency":
            wrong += [value for value in given if math.isfinite(value) and value != int(value)]
        if wrong:
            kind = "a whole number, 1 or more" if self.axis == "concurrency" else "a number above 0"
            raise ProfileError(f"a {self.axis} is {kind}; seen: {wrong[0]:g}")
        if len(set(self.values)) != len(self.values):
            raise ProfileError(
                f"a load stands in the ladder twice: {', '.join(f'{v:g}' for v in self.values)}"
            )

    @property
    def automatic(self) -> bool:
        """Whether the loads are found on the way."""
        return not self.values

    @property
    def top(self) -> float:
        """The highest load that an automatic ladder tries."""
        return self.maximum or (MAX_CONCURRENCY if self.axis == "concurrency" else MAX_RATE_PER_S)


def ladder_from_text(text: str) -> Ladder:
    """The ladder that a command line names: ``concurrency=1,2,4``, ``concurrency=1..64``, ``rate=10,20.5``, ``rate=auto``.

    ``1..64`` doubles from 1 to 64, both included.

    Raises:
        ProfileError: it is none of these.
    """
    axis, equals, loads = text.partition("=")
    if axis not in ("concurrency", "rate") or not equals or not loads:
        raise ProfileError(
            f"a sweep is over concurrency or rate; seen: {text!r}",
            hint="write concurrency=1,2,4, concurrency=1..64, concurrency=auto, or the same with rate",
        )
    named: Axis = "concurrency" if axis == "concurrency" else "rate"
    if loads == "auto":
        return Ladder(named)
    low, dots, high = loads.partition("..")
    try:
        values = (
            _doubled(float(low), float(high)) if dots else tuple(float(part) for part in loads.split(","))
        )
    except (ValueError, OverflowError) as error:
        raise ProfileError(
            f"the loads of a sweep are numbers, auto, or LOW..HIGH; seen: {loads!r}"
        ) from error
    return Ladder(named, values)


def next_load(ladder: Ladder, points: Sequence[Measured], *, slo: bool) -> float | None:
    """The load to measure after ``points``; None: the sweep is done.

    An automatic ladder doubles until the throughput no longer grows (concurrency), the server no longer keeps up (rate),
    the SLO is broken, or a run is void; then it closes in on the highest load that fits, if there is an SLO or a rate.
    """
    seen = {point.load for point in points}
    if not ladder.automatic:
        return next((value for value in ladder.values if value not in seen), None)
    if not points:
        return ladder.start or 1
    wanted = _climbed(ladder, points)
    if wanted is None and (slo or ladder.axis == "rate"):
        wanted = _closer(ladder, points)
    return None if wanted in seen else wanted


def _climbed(ladder: Ladder, points: Sequence[Measured]) -> float | None:
    """The next doubling; None when the climb is over."""
    ordered = sorted(points, key=lambda point: point.load)
    highest = ordered[-1]
    if not highest.usable or any(point.fits is False for point in ordered):
        return None
    below = [point.throughput_per_s for point in ordered[:-1] if point.usable]
    if ladder.axis == "concurrency" and below and highest.throughput_per_s < GAIN * max(below):
        return None
    return min(2 * highest.load, ladder.top) if highest.load < ladder.top else None


def _closer(ladder: Ladder, points: Sequence[Measured]) -> float | None:
    """A load between the highest that fits and the lowest that does not; None when these are close."""
    broken = min((point.load for point in points if point.fits is False), default=None)
    if broken is None:
        return None
    kept = max((point.load for point in points if point.fits and point.load < broken), default=None)
    if kept is None:
        return _lower(ladder, points, broken)
    middle = math.sqrt(kept * broken)
    if ladder.axis == "concurrency":
        return round(middle) if broken - kept > max(1, (CLOSE - 1) * kept) else None
    return float(f"{middle:.3g}") if broken > CLOSE * kept else None


def _lower(ladder: Ladder, points: Sequence[Measured], broken: float) -> float | None:
    """Where even the first rate was too much: a few much lower ones."""
    if ladder.axis == "concurrency":
        return max(broken // 2, 1) if broken > 1 else None
    first = points[0].load
    lowest = first / _DESCENT_FACTOR**_DESCENTS
    return float(f"{broken / _DESCENT_FACTOR:.3g}") if broken > lowest * 1.01 else None


def _doubled(low: float, high: float) -> tuple[float, ...]:
    if not 0 < low <= high < math.inf:
        raise ValueError(f"{low} to {high}")
    steps = math.ceil(math.log2(high / low) - 1e-9)
    return (*(low * 2**step for step in range(steps)), high)
