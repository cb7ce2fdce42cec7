"""What one saved run observed in the course of its window, for resampling: the raw material of ``BlockRatio``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Run
from enginesmith_client.perf.compare._bootstrap import Series
from enginesmith_client.perf.judge._metrics import tpot_ns

QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
Pairs: TypeAlias = Iterable[tuple[int, float]]


def quantile_of(metric: str) -> float | None:
    """Which quantile a metric is, by its name (``latency_ms.p50``); None for one that is a sum over the window."""
    return QUANTILES.get(metric.partition(".")[2])


def series_of(metric: str, run: Run, records: Sequence[Record]) -> Series | None:
    """The values of a metric and when they were seen; None for one that single requests do not have.

    Times are taken as ``judge._metrics`` takes them: in a closed loop of the answers that ended within the window, in an
    open loop of the requests that were due within it. What is counted is counted when it ended.
    """
    answered = [record for record in records if record.ok]
    closed = run.figures.offered_per_s is None
    when = _ended if closed or quantile_of(metric) is None else _due
    if metric in _COUNTED:
        pairs: Pairs = ((_ended(record), _COUNTED[metric](record)) for record in answered)
    elif metric.partition(".")[0] in _TIMES:
        value = _TIMES[metric.partition(".")[0]]
        pairs = ((when(record), ms) for record in answered if (ms := value(record)) is not None)
    else:
        return None
    start_ns, end_ns = run.window.start_ns, run.window.end_ns
    inside = [(at_ns, value) for at_ns, value in pairs if start_ns <= at_ns < end_ns]
    length_ns = max(end_ns - start_ns, 1)
    at = np.array([(at_ns - start_ns) / length_ns for at_ns, _ in inside], float)
    values = np.array([value for _, value in inside], float)
    return Series(at, values if quantile_of(metric) else values * (1e9 / length_ns))


def _ended(record: Record) -> int:
    return record.ended_ns


def _due(record: Record) -> int:
    return record.due_ns


def _ms(value_ns: float | None) -> float | None:
    return None if value_ns is None else value_ns / 1e6


_COUNTED: Mapping[str, Callable[[Record], float]] = {
    "requests_per_s": lambda _: 1.0,
    "output_tokens_per_s": lambda record: float(record.output_tokens or 0),
}
_TIMES: Mapping[str, Callable[[Record], float | None]] = {
    "latency_ms": lambda record: _ms(record.latency_ns),
    "ttft_ms": lambda record: _ms(record.ttft_ns),
    "tpot_ms": lambda record: _ms(tpot_ns(record)),
}
