"""Plots of how values are distributed: the latency CDF, histograms of TTFT and ITL, batch sizes.

However many values there are, a plot keeps a few hundred points at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from enginesmith_client.perf._quantities import quantity
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Run
from enginesmith_client.perf.judge._metrics import NEEDED, population
from enginesmith_client.perf.report._plots import Axis, Bars, Histogram, Lines, Mark, Plot, Series

Values = NDArray[np.float64]

_MOST_BINS = 40
_FEWEST_BINS = 8
_CDF_POINTS = 120
_LOG_FROM = 8.0
"""Histograms of values that lie further apart than this factor have a logarithmic axis."""


def measured(run: Run, records: Iterable[Record]) -> list[Record]:
    """The records that the figures of ``run`` are of."""
    return population(records, run.window, closed=run.profile.get("load", {}).get("loop") != "open")


@dataclass(frozen=True)
class Times:
    """Of the answered requests of a run, in milliseconds, each sorted."""

    latency: Values
    ttft: Values = field(default_factory=lambda: np.empty(0))
    itl: Values = field(default_factory=lambda: np.empty(0))


def times_of(records: Sequence[Record]) -> Times:
    """What the plots below are drawn from."""
    answered = [record for record in records if record.ok]
    pieces = [np.diff(record.piece_ns) for record in answered if len(record.piece_ns) > 1]
    return Times(
        latency=_sorted_ms(record.latency_ns for record in answered),
        ttft=_sorted_ms(record.ttft_ns for record in answered if record.ttft_ns is not None),
        itl=np.sort(np.concatenate(pieces) / 1e6) if pieces else np.empty(0),
    )


def distribution_plots(run: Run, times: Times) -> tuple[Plot, ...]:
    """All that there is something to draw of."""
    slo = run.profile.get("slo", {})
    plots: list[Plot] = []
    if times.latency.size:
        plots.append(latency_cdf({"latency": times.latency}, slo))
    if times.ttft.size:
        plots.append(histogram("Time to first token", times.ttft, limit_ms=slo.get("ttft_ms")))
    if times.itl.size:
        plots.append(
            histogram("Inter-token latency", times.itl, limit_ms=slo.get("itl_ms"), limit_of=" for the mean")
        )
    if run.figures.server and run.figures.server.batch_sizes:
        plots.append(_batch_sizes(run.figures.server.batch_sizes))
    return tuple(plots)


def latency_cdf(populations: Mapping[str, Values], slo: Mapping[str, Any]) -> Lines:
    """The share of answers that came within a time. With one population its p50 and p99 are marked."""
    series = tuple(_cdf(name, values) for name, values in populations.items())
    marks: list[Mark] = []
    words = []
    for name, values in populations.items():
        words.append(f"{name}: {_within(values)}, all within {quantity(float(values[-1]), 'ms')}")
        if len(populations) == 1:
            marks += _middle_and_tail(values)
    if slo.get("p99_latency_ms") is not None:
        marks.append(_limit(slo["p99_latency_ms"]))
    return Lines(
        title="Latency: share of answers within a time",
        words="; ".join(words),
        x=Axis("latency, logarithmic", "ms", log=True),
        y=Axis("answers within", "percent"),
        series=series,
        marks=tuple(marks),
    )


def histogram(title: str, values: Values, *, limit_ms: float | None, limit_of: str = "") -> Histogram:
    """``values`` (sorted, ms) in bins from the smallest to the largest. ``limit_of`` says what the limit is of."""
    low, high = float(values[0]), float(values[-1])
    log = low > 0 and high / low > _LOG_FROM
    if low == high:
        low, high = low * 0.95, high * 1.05 or 1.0
    bins = min(max(_FEWEST_BINS, round(2 * math.sqrt(values.size))), _MOST_BINS)
    edges = np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)
    edges[-1] = np.nextafter(edges[-1], np.inf)
    edges[0] = min(edges[0], low)
    counts, _ = np.histogram(values, edges)
    marks = _middle_and_tail(values)
    ends = float(edges[0]), float(edges[-1])
    if limit_ms is not None and low / 2 <= limit_ms <= high * 2:
        marks.append(_limit(limit_ms, limit_of))
        ends = min(ends[0], limit_ms), max(ends[1], limit_ms)
    elif limit_ms is not None:
        side = "right" if limit_ms > high else "left"
        marks.append(
            Mark("x", limit_ms, f"SLO {quantity(limit_ms, 'ms')}{limit_of}, far to the {side}", "bad")
        )
    return Histogram(
        title=title,
        words=f"{values.size:,} values; {_within(values)}",
        x=Axis(f"{title.lower()}, logarithmic" if log else title.lower(), "ms", log=log, ends=ends),
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        marks=tuple(marks),
    )


def at_quantile(values: Values, share: float) -> float:
    """A quantile of sorted values, by the same rank as in the figures."""
    return float(values[math.floor(share * (values.size - 1) + 0.5)])


def _has_p99(values: Values) -> bool:
    return values.size >= NEEDED[99.0]


def _within(values: Values) -> str:
    half = f"half within {quantity(at_quantile(values, 0.5), 'ms')}"
    return f"{half}, 99% within {quantity(at_quantile(values, 0.99), 'ms')}" if _has_p99(values) else half


def _middle_and_tail(values: Values) -> list[Mark]:
    shares = {"p50": 0.5, "p99": 0.99} if _has_p99(values) else {"p50": 0.5}
    found = {name: at_quantile(values, share) for name, share in shares.items()}
    return [Mark("x", value, f"{name} {quantity(value, 'ms')}") for name, value in found.items()]


def _limit(value: float, of: str = "") -> Mark:
    return Mark("x", value, f"SLO {quantity(value, 'ms')}{of}", "bad")


def _cdf(name: str, values: Values) -> Series:
    """Quantiles evenly spaced, and ever finer ones towards the slowest answer."""
    tail = 1 - np.geomspace(0.02, 1 / max(values.size, 51), _CDF_POINTS // 3)
    shares = np.unique(np.concatenate([np.linspace(1 / values.size, 0.98, _CDF_POINTS), tail, [1.0]]))
    ranks = np.unique(np.clip(np.ceil(shares * values.size - 1e-9).astype(np.int64), 1, values.size))
    within = 100 * ranks / values.size
    times = values[ranks - 1]
    return Series(
        name,
        x=tuple(float(time) for time in times),
        y=tuple(float(share) for share in within),
        labels=tuple(
            f"{name}: {share:.4g}% within {quantity(float(time), 'ms')}"
            for share, time in zip(within, times, strict=True)
        ),
        steps=values.size < _CDF_POINTS,
    )


def _batch_sizes(sizes: Mapping[int, int]) -> Bars:
    total = sum(sizes.values()) or 1
    ordered = sorted(sizes.items())
    most = max(ordered, key=lambda item: item[1])
    return Bars(
        title="Batch sizes that were formed",
        words=f"{total:,} executions; most of them ({100 * most[1] / total:.0f}%) of size {most[0]}",
        x_label="batch size",
        y=Axis("executions", "count"),
        names=tuple(str(size) for size, _ in ordered),
        values=tuple(float(count) for _, count in ordered),
    )


def _sorted_ms(values_ns: Iterable[int]) -> Values:
    return np.sort(np.fromiter(values_ns, dtype=np.float64) / 1e6)
