"""Where on the curve of throughput and latency the knee is. Pure: numbers in, a knee out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIN_POINTS = 3


@dataclass(frozen=True)
class Knee:
    """The load at which throughput divided by latency is highest.

    This is Kleinrock's *power* of a queueing system (Power and deterministic rules of thumb for probabilistic problems in
    computer communications, ICC 1979). Up to the knee one percent more latency buys more than one percent of
    throughput, beyond it less. It has no parameter to choose and needs no smoothing, which a ladder of six or eight
    points would not survive; Kneedle, the usual alternative, needs both.
    """

    load: float
    throughput_per_s: float
    latency_ms: float
    reached: bool
    """False: it is the last point, so the true knee may lie beyond the ladder."""


@dataclass(frozen=True)
class LoadPoint:
    """What one load came to."""

    load: float
    throughput_per_s: float
    latency_ms: float
    """Mean."""


def knee_of(points: Sequence[LoadPoint]) -> Knee | None:
    """The knee of a ladder; None for fewer than 3 points that answered anything."""
    usable = sorted(
        (point for point in points if point.throughput_per_s > 0 and point.latency_ms > 0),
        key=lambda point: point.load,
    )
    if len(usable) < MIN_POINTS:
        return None
    best = max(usable, key=lambda point: point.throughput_per_s / point.latency_ms)
    return Knee(best.load, best.throughput_per_s, best.latency_ms, best is not usable[-1])
