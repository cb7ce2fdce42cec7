"""What a sweep found, said in sentences; also what it did not find, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from enginesmith_client.perf._run_files import SloVerdict
from enginesmith_client.perf.many._knee import MIN_POINTS, Knee
from enginesmith_client.perf.many._ladder import Axis


class Told(Protocol):
    """What of a point the sentences need; ``_sweep.Point``."""

    @property
    def load(self) -> float: ...
    @property
    def name(self) -> str: ...
    @property
    def void(self) -> str: ...
    @property
    def fits(self) -> bool | None: ...
    @property
    def sustained(self) -> bool: ...
    @property
    def slo_met(self) -> bool | None: ...
    @property
    def slo(self) -> tuple[SloVerdict, ...]: ...
    @property
    def offered_per_s(self) -> float | None: ...
    @property
    def throughput_per_s(self) -> float: ...


def words_of(
    points: Sequence[Told], *, highest: Told | None, knee: Knee | None, has_slo: bool, axis: Axis
) -> tuple[str, ...]:
    """Sentences about the limit, the knee and what was not used. ``points`` are ordered by load."""
    usable = [point for point in points if not point.void]
    lines = [_limit(usable, highest, has_slo=has_slo, axis=axis), *_knee(knee, axis)]
    lines += [f"not used: {point.name}: {point.void}" for point in points if point.void]
    lines += [
        f"the SLO could not be judged at {point.name}: {_unmeasured(point.slo)}"
        for point in usable
        if point.sustained and point.slo and point.slo_met is None
    ]
    return tuple(line for line in lines if line)


def _limit(points: Sequence[Told], highest: Told | None, *, has_slo: bool, axis: Axis) -> str:
    if not points:
        return "nothing was found: no point can be used"
    broken = next((point for point in points if point.fits is False), None)
    if not has_slo and axis == "concurrency" and broken is None:
        return "no SLO was given, so no load is too high"
    slo = has_slo or (broken is not None and broken.sustained)
    what = "the SLO" if slo else "the offered rate"
    if highest is None and broken is None:
        return f"whether {what} is kept could not be judged at any load"
    if highest is None and broken is not None:
        word = "SLO impossible" if slo else "the server keeps up with no rate that was tried"
        return f"{word}: even at {broken.name} {_why(broken)}"
    assert highest is not None
    at = f"{highest.name} ({highest.throughput_per_s:.4g} requests/s answered)"
    if broken is None:
        return f"{what} was kept up to {at}, where the ladder ended: the limit was not found and is higher"
    again = [point.name for point in points if point.fits and point.load > broken.load]
    doubt = (
        f"; kept again at {', '.join(again)}, so measure longer before you trust this limit" if again else ""
    )
    return f"highest load within {what}: {at}; at {broken.name} {_why(broken)}{doubt}"


def _why(point: Told) -> str:
    """What was broken, with numbers."""
    if not point.sustained:
        return (
            f"the server answered {point.throughput_per_s:.4g} of {point.offered_per_s or 0:.4g} requests/s"
        )
    return ", ".join(
        f"{verdict.name} is {verdict.measured:.4g} where {verdict.limit:g} is allowed"
        for verdict in point.slo
        if verdict.met is False and verdict.measured is not None
    )


def _unmeasured(slo: Sequence[SloVerdict]) -> str:
    return f"{', '.join(verdict.name for verdict in slo if verdict.met is None)} was not measured"


def _knee(knee: Knee | None, axis: Axis) -> list[str]:
    if knee is None:
        return [f"no knee: that needs {MIN_POINTS} usable points"]
    at = f"{knee.load:g} {'at a time' if axis == 'concurrency' else 'requests/s'}"
    figures = f"{knee.throughput_per_s:.4g} requests/s at a mean latency of {knee.latency_ms:.4g} ms"
    if not knee.reached:
        return [
            f"the knee was not reached: throughput / latency is highest at the last load, {at} ({figures})"
        ]
    return [f"knee (highest throughput / latency): {at}, {figures}"]
