"""Plots over time: throughput and failures, latency, CPU and memory, all on the run's own clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from enginesmith_client.perf._quantities import quantity
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Run
from enginesmith_client.perf.observe._samples import Sample
from enginesmith_client.perf.report._plots import Axis, Lines, Plot, Series, Span

_WIDTHS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_MOST_BINS = 150
_FEWEST_BINS = 8
_RECORDS_PER_BIN = 5


@dataclass(frozen=True)
class _Clock:
    """Equal parts of a run."""

    start_s: float
    end_s: float
    width_s: float

    @property
    def count(self) -> int:
        """A last part that would be shorter than half belongs to the one before: its rates would jump."""
        return max(round((self.end_s - self.start_s) / self.width_s), 1)

    @property
    def starts_s(self) -> tuple[float, ...]:
        return tuple(round(self.start_s + number * self.width_s, 6) for number in range(self.count))

    def part(self, at_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Which part each time lies in."""
        part: NDArray[np.int64] = np.floor((at_s - self.start_s) / self.width_s).astype(np.int64)
        return part.clip(0, self.count - 1)

    def lasts_s(self) -> NDArray[np.float64]:
        """How long each part is: all the same, but for the last."""
        return np.diff([*self.starts_s, self.end_s])


def timeline_plots(run: Run, records: Sequence[Record], samples: Sequence[Sample]) -> tuple[Plot, ...]:
    """What happened when; of the whole run, with its warm-up. Empty without records."""
    if not records:
        return ()
    clock = _clock(records)
    window = run.window
    spans = (Span(window.start_ns / 1e9, window.end_ns / 1e9, "measured"),)
    end_s = max([clock.end_s, *(sample.at_ns / 1e9 for sample in samples)])
    time = Axis("time since the run began", "s", ends=(clock.start_s, end_s))
    plots: list[Plot] = [_throughput(records, clock, time, spans)]
    plots += _latencies(records, clock, time, spans)
    plots += _usage(samples, time, spans)
    return tuple(plots)


def _clock(records: Sequence[Record]) -> _Clock:
    start_s = min(0.0, min(record.due_ns for record in records) / 1e9)
    end_s = max(record.ended_ns for record in records) / 1e9
    long_s = max(end_s - start_s, 1e-3)
    # Parts that hold a request or two would show nothing but chance.
    bins = min(_MOST_BINS, max(_FEWEST_BINS, len(records) // _RECORDS_PER_BIN))
    width_s = next((width for width in _WIDTHS_S if long_s / width <= bins), long_s / bins)
    return _Clock(start_s, start_s + long_s, min(width_s, long_s))


def _throughput(records: Sequence[Record], clock: _Clock, time: Axis, spans: tuple[Span, ...]) -> Lines:
    ended = np.array([record.ended_ns for record in records]) / 1e9
    ok = np.array([record.ok for record in records])
    answered = np.bincount(clock.part(ended[ok]), minlength=clock.count) / clock.lasts_s()
    failed = np.bincount(clock.part(ended[~ok]), minlength=clock.count) / clock.lasts_s()
    series = [_over_time("answered", clock, answered, "per_s")]
    if not ok.all():
        series.append(_over_time("failed", clock, failed, "per_s"))
    lost = f"; {int((~ok).sum()):,} requests failed" if not ok.all() else "; none failed"
    return Lines(
        title="Answers per second",
        words=f"per {quantity(clock.width_s, 's')}: from {quantity(float(answered.min()), 'per_s')} "
        f"to {quantity(float(answered.max()), 'per_s')}{lost}",
        x=time,
        y=Axis("requests per second", "per_s"),
        series=tuple(series),
        spans=spans,
    )


def _latencies(records: Sequence[Record], clock: _Clock, time: Axis, spans: tuple[Span, ...]) -> list[Plot]:
    answered = [record for record in records if record.ok]
    if not answered:
        return []
    part = clock.part(np.array([record.due_ns for record in answered]) / 1e9)
    latency = np.array([record.latency_ns for record in answered]) / 1e6
    order = np.lexsort((latency, part))
    counts = np.bincount(part, minlength=clock.count)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ordered = latency[order]

    def quantile(share: float) -> NDArray[np.float64]:
        rank = np.maximum(np.ceil(share * counts).astype(np.int64) - 1, 0)
        found = ordered[np.minimum(first + rank, ordered.size - 1)]
        return np.where(counts > 0, found, np.nan)

    p99 = quantile(0.99)
    return [
        Lines(
            title="Latency over time",
            words=f"of the requests that were due in each {quantity(clock.width_s, 's')} (fewer than 100: p99 is the "
            f"slowest); p99 from {quantity(float(np.nanmin(p99)), 'ms')} to {quantity(float(np.nanmax(p99)), 'ms')}",
            x=time,
            y=Axis("latency, logarithmic", "ms", log=True),
            series=(
                _over_time("p50", clock, quantile(0.5), "ms"),
                _over_time("p99", clock, p99, "ms"),
            ),
            spans=spans,
        )
    ]


def _over_time(name: str, clock: _Clock, values: NDArray[np.float64], unit: str) -> Series:
    shown = tuple(None if np.isnan(value) else float(value) for value in values)
    starts = clock.starts_s
    labels = tuple(
        f"{name}: {quantity(value, 'ms' if unit == 'ms' else 'per_s')} from {quantity(start, 's')}"
        for start, value in zip(starts, shown, strict=True)
    )
    ends = (*starts[1:], clock.end_s)
    points: list[tuple[float, float | None, str]] = []
    for start, end, value, following, label in zip(
        starts, ends, shown, (*shown[1:], None), labels, strict=True
    ):
        points.append((start, value, label))
        if value is not None and following is None:
            # A value holds to the end of its part, also where nothing follows it.
            points.append((end, value, label))
    return Series(
        name,
        tuple(at for at, _, _ in points),
        tuple(value for _, value, _ in points),
        labels=tuple(label for _, _, label in points),
        steps=True,
    )


def _usage(samples: Sequence[Sample], time: Axis, spans: tuple[Span, ...]) -> list[Plot]:
    thinned = samples[:: max(len(samples) // _MOST_BINS, 1)]
    busy = [
        _rates("server", thinned, lambda one: one.server_cpu_s),
        _rates("load generator", thinned, lambda one: one.client_cpu_s),
    ]
    cpu = tuple(series for series in busy if series is not None)
    rss = [(one.at_ns / 1e9, one.server_rss_bytes) for one in thinned if one.server_rss_bytes is not None]
    plots: list[Plot] = []
    if cpu:
        most = "; ".join(
            f"{one.name} up to {quantity(max(y for y in one.y if y is not None), 'percent')}" for one in cpu
        )
        words = f"100% is one core; {most}"
        plots.append(Lines("CPU", words, time, Axis("CPU, 100% is one core", "percent"), cpu, spans=spans))
    if len(rss) > 1:
        memory = Series("server", tuple(at for at, _ in rss), tuple(float(size) for _, size in rss))
        words = f"the most was {quantity(max(size for _, size in rss), 'bytes')}"
        plots.append(
            Lines(
                "Memory of the server", words, time, Axis("resident memory", "bytes"), (memory,), spans=spans
            )
        )
    return plots


def _rates(name: str, samples: Sequence[Sample], seconds: Callable[[Sample], float | None]) -> Series | None:
    """CPU seconds per second, in percent of a core, between one sample and the next."""
    at, percents = [], []
    for one, following in pairwise(samples):
        before, after = seconds(one), seconds(following)
        # Counters of another server begin anew.
        if before is None or after is None or after < before or following.at_ns <= one.at_ns:
            continue
        at.append(one.at_ns / 1e9)
        percents.append(100 * (after - before) / ((following.at_ns - one.at_ns) / 1e9))
    return Series(name, tuple(at), tuple(percents), steps=True) if at else None
