"""What the rules of the self-check look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import ClosedLoad, Profile
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.observe._samples import Sample


@dataclass(frozen=True)
class Evidence:
    """A run, seen from all sides."""

    records: Sequence[Record]
    """Of the whole run."""
    judged: Sequence[Record]
    """Those that belong to the window."""
    window: Window
    figures: Figures
    samples: Sequence[Sample]
    around: tuple[Sample, Sample] | None
    """The samples with statistics nearest to the window's ends."""
    profile: Profile
    client_cpu_s: float | None
    """Of this process within the window; None of a run of perf_analyzer."""
    wall_moved_s: float | None
    """How far the wall clock moved against the monotonic one; None: only the samples tell."""
    generator: str

    @property
    def closed(self) -> bool:
        """Whether it is a closed loop."""
        return isinstance(self.profile.load, ClosedLoad)

    @property
    def window_s(self) -> float:
        """The length of the window."""
        return (self.window.end_ns - self.window.start_ns) / 1e9

    @property
    def p50_ms(self) -> float:
        """Median latency; 0 when nothing was answered."""
        return self.figures.latency_ms.p50 if self.figures.latency_ms else 0.0

    def seen_in_window(self) -> list[Sample]:
        """The samples from the last before the window to the first after it."""
        start = max((one.at_ns for one in self.samples if one.at_ns <= self.window.start_ns), default=None)
        end = min((one.at_ns for one in self.samples if one.at_ns >= self.window.end_ns), default=None)
        return [
            one
            for one in self.samples
            if (start is None or one.at_ns >= start) and (end is None or one.at_ns <= end)
        ]
