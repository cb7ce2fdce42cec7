"""The phases of a load: warm-up, measurement, its end; which part of it is measured, and why it ended. Pure.

Times are nanoseconds since the run's origin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from enginesmith_client.perf._profile import ClosedLoad, Profile, TraceArrivals
from enginesmith_client.perf._progress import Phase
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.load._steady import Windows

_NS = 1_000_000_000
SETTLE_NS = 20_000_000
"""Answers that came before the end of a window may need this long until they are counted."""


@dataclass(frozen=True)
class Ending:
    """Why a load ended."""

    status: Literal["complete", "partial"]
    words: str


class Measured:
    """What of a load is measured; it is told what happens, and says when there is enough."""

    def __init__(self, profile: Profile, start_ns: int) -> None:
        self._measure = profile.measure
        self._closed = isinstance(profile.load, ClosedLoad)
        self._trace = not isinstance(profile.load, ClosedLoad) and isinstance(
            profile.load.arrivals, TraceArrivals
        )
        self._cold = profile.start == "cold"
        self._start_ns = start_ns
        self._windows: Windows | None = None
        self._requests = 0
        self._settled: Window | None = None
        self._end_ns: int | None = None
        if self._cold or not (self._measure.warmup_s or self._measure.warmup_requests):
            self._begin(start_ns)

    @property
    def phase(self) -> Phase:
        """``warming up`` or ``measuring``."""
        return "warming up" if self._windows is None else "measuring"

    @property
    def latest_ns(self) -> int:
        """When the phase ends at the latest."""
        if self._windows is not None:
            return self._windows.end_ns
        return self._start_ns + round(self._measure.warmup_s * _NS)

    @property
    def decides_ns(self) -> int:
        """When ``advance`` may next have something to decide."""
        if self._windows is None or self._trace:
            return self.latest_ns + SETTLE_NS
        return self._windows.next_end_ns + SETTLE_NS

    def was_due(self, at_ns: int) -> Ending | None:
        """A request of an open loop is sent; the ending if it is the last one that is wanted."""
        if self._windows is None:
            return None
        self._windows.was_due(at_ns)
        return None if self._closed else self._counted(at_ns)

    def ended(self, at_ns: int, *, latency_ns: int, ok: bool) -> Ending | None:
        """A request was answered or failed; the ending if it is the last one that is wanted."""
        if self._windows is None:
            return None
        if ok:
            self._windows.answered(at_ns, latency_ns=latency_ns)
        return self._counted(at_ns) if self._closed else None

    def advance(self, now_ns: int, *, answered: int) -> Ending | None:
        """Go on to the measurement, or end it, when it is time."""
        measure = self._measure
        if self._windows is None:
            warm_s = (now_ns - self._start_ns) / _NS
            if warm_s >= measure.warmup_s and (
                answered >= measure.warmup_requests or warm_s >= measure.max_s
            ):
                self._begin(now_ns)
            return None
        found = None if self._trace else self._windows.agreed(now_ns - SETTLE_NS)
        if found is not None:
            self._settled = replace(found, start_ns=self._start_ns) if self._cold else found
            return Ending("complete", f"steady: {found.note}")
        if now_ns - SETTLE_NS >= self._windows.end_ns:
            self._end_ns = self._windows.end_ns
            return Ending("complete", f"max_s: {measure.max_s:g} s were measured")
        return None

    def window(self, ended_ns: int, ending: Ending) -> Window:
        """What is measured of a load that ended at ``ended_ns``."""
        if self._settled is not None:
            return self._settled
        if self._windows is None:
            note = f"nothing was measured: it ended during the warm-up ({ending.words})"
            return Window(self._start_ns, max(ended_ns, self._start_ns + 1), False, note)
        end_ns = ended_ns if self._end_ns is None else self._end_ns
        if self._trace:
            note = f"{ending.words}; a trace is replayed whole, its windows are not compared"
            return Window(self._windows.start_ns, max(end_ns, self._windows.start_ns + 1), True, note)
        return self._windows.whole(end_ns, why=ending.words)

    def _begin(self, at_ns: int) -> None:
        self._windows = Windows(at_ns, self._measure, closed=self._closed)

    def _counted(self, at_ns: int) -> Ending | None:
        windows, wanted = self._windows, self._measure.max_requests
        if wanted is None or windows is None or self._end_ns is not None or at_ns < windows.start_ns:
            return None
        self._requests += 1
        if self._requests < wanted:
            return None
        self._end_ns = at_ns + 1
        return Ending("complete", f"max_requests: {wanted} requests were measured")
