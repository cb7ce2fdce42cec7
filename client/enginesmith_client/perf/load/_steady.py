"""Whether a measurement has become steady: windows of equal length whose throughput and median latency agree. Pure.

Agreement says that nothing changed from window to window, not that the server behaved: what repeats more slowly than a
window (a stall of a second in every ten, a cache that fills for minutes) lies in one window and not in the next, or in
none of those that agreed. So a window must be longer than what repeats in the server.

In an open loop the arrivals themselves are random, and a few requests more or less in a window are no change of the
server. So what is compared there is the share of the due requests that were answered.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from enginesmith_client.perf._profile import MeasurePart
from enginesmith_client.perf._run_files import Window

_NS = 1_000_000_000


@dataclass(frozen=True)
class _Part:
    """What happened between two moments."""

    answered: int
    due: int
    """0 in a closed loop."""
    median_ns: float
    """Of the latencies of what was answered; 0 where nothing was."""


@dataclass
class _Events:
    """The raw material of one window."""

    ended_ns: list[int] = field(default_factory=list)
    latency_ns: list[int] = field(default_factory=list)
    due_ns: list[int] = field(default_factory=list)


class Windows:
    """A measurement that goes on, cut into windows from ``start_ns`` on. Nothing before that is counted."""

    def __init__(self, start_ns: int, measure: MeasurePart, *, closed: bool) -> None:
        self.start_ns = start_ns
        self.end_ns = start_ns + round(measure.max_s * _NS)
        """When the measurement ends at the latest."""
        self._measure = measure
        self._closed = closed
        self._length_ns = round(measure.window_s * _NS)
        self._events: dict[int, _Events] = {}
        self._looked_at = 0
        self._parts: dict[int, _Part] = {}

    @property
    def next_end_ns(self) -> int:
        """When the window ends that was not looked at yet."""
        return min(self.start_ns + (self._looked_at + 1) * self._length_ns, self.end_ns)

    def was_due(self, at_ns: int) -> None:
        """A request of an open loop."""
        if at_ns >= self.start_ns:
            self._of(at_ns).due_ns.append(at_ns)

    def answered(self, ended_ns: int, *, latency_ns: int) -> None:
        """A request that was answered."""
        if ended_ns >= self.start_ns:
            events = self._of(ended_ns)
            events.ended_ns.append(ended_ns)
            events.latency_ns.append(latency_ns)

    def agreed(self, until_ns: int) -> Window | None:
        """The first windows that agreed, of those that are over at ``until_ns``; None if none did yet."""
        count = self._measure.windows
        while self.start_ns + (self._looked_at + 1) * self._length_ns <= min(until_ns, self.end_ns):
            self._looked_at += 1
            last = self._looked_at - 1
            self._parts[last] = _part([self._events.get(last, _Events())])
            parts = [self._parts[index] for index in range(max(0, last - count + 1), last + 1)]
            if len(parts) == count and self._differ_percent(parts) is not None:
                return self._window(last - count + 1, last + 1)
            self._forget_before(last - count + 1)
        return None

    def whole(self, until_ns: int, *, why: str) -> Window:
        """All of the measurement, for one of which ``agreed`` found nothing; ``why`` begins the note.

        One that was too short for its windows is judged by as many equal parts of it.
        """
        end_ns = max(until_ns, self.start_ns + 1)
        count, seconds = self._measure.windows, (end_ns - self.start_ns) / _NS
        if self._looked_at >= count:
            words = (
                f"{self._looked_at} windows of {self._measure.window_s:g} s, no {count} of which in a row "
                f"agreed within {self._measure.stability_percent:g}%"
            )
            return Window(self.start_ns, end_ns, False, f"{why}; {words}")
        parts = self._equal_parts(end_ns)
        steady = self._differ_percent(parts) is not None
        words = f"its {count} parts of {seconds / count:.3g} s {'agree' if steady else 'do not agree'}"
        return Window(
            self.start_ns,
            end_ns,
            steady,
            f"{why}; {words} within {self._measure.stability_percent:g}%",
        )

    def _of(self, at_ns: int) -> _Events:
        index = (at_ns - self.start_ns) // self._length_ns
        events = self._events.get(index)
        if events is None:
            events = self._events[index] = _Events()
        return events

    def _forget_before(self, first: int) -> None:
        # The first windows are kept for as long as the measurement may yet turn out too short.
        if self._looked_at >= self._measure.windows:
            for index in [index for index in self._events if index < first]:
                del self._events[index]
            for index in [index for index in self._parts if index < first]:
                del self._parts[index]

    def _equal_parts(self, end_ns: int) -> list[_Part]:
        count = self._measure.windows
        edges = [self.start_ns + (end_ns - self.start_ns) * index // count for index in range(count + 1)]
        return [
            _part(self._events.values(), start_ns=start_ns, end_ns=stop_ns)
            for start_ns, stop_ns in itertools.pairwise(edges)
        ]

    def _differ_percent(self, parts: Sequence[_Part]) -> float | None:
        """How far the farthest part is from the mean of all; None if that is too far."""
        if not all(part.answered for part in parts):
            return None
        percent = self._measure.stability_percent
        latency = _spread_percent([part.median_ns for part in parts])
        if self._closed:
            counts = [float(part.answered) for part in parts]
        else:
            counts = [part.answered / max(1, part.due) for part in parts]
        throughput = _spread_percent(counts)
        # One answer more or less is where the window happened to end.
        mean = statistics.fmean(part.answered for part in parts)
        throughput_agrees = throughput <= max(percent, 100.0 / mean)
        return max(latency, throughput) if latency <= percent and throughput_agrees else None

    def _window(self, first: int, stop: int) -> Window:
        start_ns, end_ns = (self.start_ns + index * self._length_ns for index in (first, stop))
        differ = self._differ_percent([self._parts[index] for index in range(first, stop)])
        measure = self._measure
        note = (
            f"{measure.windows} windows of {measure.window_s:g} s agreed within {differ:.1f}% "
            f"(allowed: {measure.stability_percent:g}%)"
        )
        return Window(start_ns, end_ns, True, note)


def _part(events: Iterable[_Events], *, start_ns: int | None = None, end_ns: int | None = None) -> _Part:
    """Of all events, or of those between two moments."""
    latencies, due = [], 0
    for some in events:
        if start_ns is None or end_ns is None:
            latencies += some.latency_ns
            due += len(some.due_ns)
            continue
        latencies += [
            latency_ns
            for ended_ns, latency_ns in zip(some.ended_ns, some.latency_ns, strict=True)
            if start_ns <= ended_ns < end_ns
        ]
        due += sum(start_ns <= due_ns < end_ns for due_ns in some.due_ns)
    return _Part(len(latencies), due, statistics.median(latencies) if latencies else 0.0)


def _spread_percent(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return 100.0 * max(abs(value - mean) for value in values) / mean if mean else 0.0
