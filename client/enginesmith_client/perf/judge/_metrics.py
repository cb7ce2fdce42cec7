"""Figures from records and samples. Pure: the same records give the same figures, when a run ends and ever after.

docs/bench-metrics.md defines every figure. Requests of a closed loop belong to the window when they ended within it,
those of an open loop when they were due within it, whenever they ended: a request that the server kept waiting beyond
the window's end is the very one that counts. Throughput counts answers that ended within the window in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from enginesmith_client.perf._figures import Figures, Quantiles
from enginesmith_client.perf._profile import PricePart, Profile, SloPart
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import SloVerdict, Window
from enginesmith_client.perf.judge._server_figures import server_figures, usage_figures
from enginesmith_client.perf.observe._samples import Sample

Times: TypeAlias = npt.NDArray[np.float64]
_NS_PER_MS = 1e6
NEEDED = {50.0: 1, 90.0: 10, 95.0: 20, 99.0: 100, 99.9: 1000}
"""How many samples a percentile needs at least: with fewer, none lies beyond it."""


def figures_of(
    records: Sequence[Record],
    window: Window,
    profile: Profile,
    samples: Sequence[Sample],
    *,
    closed: bool,
) -> Figures:
    """All figures of a run, or of the part of it in ``window``.

    Args:
        records: of the whole run, warm-up included, in any order.
        samples: of the whole run; none: what the server and the machine did is unknown.
        closed: which requests belong to the window.
    """
    window_s = (window.end_ns - window.start_ns) / 1e9
    judged = population(records, window, closed=closed)
    answered = [record for record in judged if record.ok]
    ended = [one for one in records if one.ok and window.start_ns <= one.ended_ns < window.end_ns]
    output_tokens = _total([one.output_tokens for one in ended])
    kept = _kept(judged, profile.slo)
    ns_per_token = _quantiles(_times(_ns_per_token(answered)))
    return Figures(
        duration_s=window_s,
        requests=len(judged),
        errors=dict(Counter(one.outcome for one in judged if not one.ok).most_common()),
        requests_per_s=_per_s(len(ended), window_s),
        rows_per_s=_per_s(sum(one.rows for one in ended), window_s),
        offered_per_s=None if closed else _per_s(len(judged), window_s),
        latency_ms=quantiles_ms(_times(one.latency_ns for one in answered)),
        ttft_ms=quantiles_ms(_times(one.piece_ns[0] - one.due_ns for one in answered if one.piece_ns)),
        itl_ms=quantiles_ms(_gaps_ns(answered)),
        tpot_ms=quantiles_ms(_times(time for one in answered if (time := tpot_ns(one)) is not None)),
        tokens_per_s_p1=1e9 / ns_per_token.p99 if ns_per_token.p99 else None,
        tokens_per_s_min=1e9 / ns_per_token.max if ns_per_token.max else None,
        output_tokens_per_s=_optional_per_s(output_tokens, window_s),
        prompt_tokens_per_s=_optional_per_s(_total([one.prompt_tokens for one in ended]), window_s),
        mean_prompt_tokens=_mean([one.prompt_tokens for one in answered]),
        mean_output_tokens=_mean([one.output_tokens for one in answered]),
        good_per_s=None if kept is None else _per_s(kept, window_s),
        good_percent=100 * kept / len(judged) if kept is not None and judged else None,
        send_lag_ms=None if closed else quantiles_ms(_times(one.lag_ns for one in judged)),
        server=server_figures(samples, window, records),
        usage=usage_figures(samples, window),
        cost_per_million_output_tokens=_cost_per_million(profile.price, output_tokens, window_s),
        cost_per_million_requests=_cost_per_million(profile.price, len(ended), window_s),
    )


def population(records: Iterable[Record], window: Window, *, closed: bool) -> list[Record]:
    """The requests that belong to the window."""
    if closed:
        return [one for one in records if window.start_ns <= one.ended_ns < window.end_ns]
    return [one for one in records if window.start_ns <= one.due_ns < window.end_ns]


def quantiles_ms(values_ns: npt.ArrayLike) -> Quantiles | None:
    """The distribution of times in nanoseconds; None of none.

    A percentile is the value of rank ``floor(q (n - 1) + 1/2)``, counted from 0 in rising order: always one that was
    measured, and the same one as perf_analyzer's (``InferenceProfiler::SummarizeLatency``).
    """
    values = np.asarray(values_ns, dtype=np.float64)
    return _quantiles(values / _NS_PER_MS) if values.size else None


def is_good(record: Record, slo: SloPart) -> bool:
    """Whether a request was answered and kept every limit that the SLO sets for one. What is unknown is not kept."""
    return record.ok and all(
        (value := measure(record)) is not None and value <= limit for limit, measure in _limits(slo)
    )


def tpot_ns(record: Record) -> float | None:
    """Time per output token after the first; None of an answer that had a single token, or came in a single piece."""
    if len(record.piece_ns) < 2 or record.output_tokens is None or record.output_tokens < 2:
        return None
    return (record.ended_ns - record.piece_ns[0]) / (record.output_tokens - 1)


def slo_verdicts(figures: Figures, slo: SloPart) -> tuple[SloVerdict, ...]:
    """What became of each promise; none where the SLO makes none. Beside others, no request may fail unless it says so.

    A promise is kept when at most one of a hundred broke it. Of fewer than a hundred, that is none: the slowest decides.
    """
    at_most: tuple[tuple[str, float | None, float | None], ...] = (
        ("p99_latency_ms", slo.p99_latency_ms, _p99_or_slowest(figures.latency_ms)),
        ("ttft_ms", slo.ttft_ms, _p99_or_slowest(figures.ttft_ms)),
        ("itl_ms", slo.itl_ms, _p99_or_slowest(figures.tpot_ms)),
    )
    verdicts = [
        SloVerdict(name, limit, measured, None if measured is None else measured <= limit)
        for name, limit, measured in at_most
        if limit is not None
    ]
    if slo.min_tokens_per_s is not None:
        least = figures.tokens_per_s_p1 or figures.tokens_per_s_min
        kept = None if least is None else least >= slo.min_tokens_per_s
        verdicts.append(SloVerdict("min_tokens_per_s", slo.min_tokens_per_s, least, kept))
    if verdicts or slo.max_error_percent is not None:
        most = slo.max_error_percent or 0.0
        failed = 100 * sum(figures.errors.values()) / figures.requests if figures.requests else None
        kept = None if failed is None else failed <= most
        verdicts.append(SloVerdict("max_error_percent", most, failed, kept))
    return tuple(verdicts)


def _p99_or_slowest(times: Quantiles | None) -> float | None:
    if times is None:
        return None
    return times.max if times.p99 is None else times.p99


def _limits(slo: SloPart) -> list[tuple[float, Callable[[Record], float | None]]]:
    """For one request: what may not be exceeded, in nanoseconds, and how it is measured."""
    limits: list[tuple[float, Callable[[Record], float | None]]] = []
    if slo.p99_latency_ms is not None:
        limits.append((slo.p99_latency_ms * _NS_PER_MS, lambda record: record.latency_ns))
    if slo.ttft_ms is not None:
        limits.append((slo.ttft_ms * _NS_PER_MS, lambda record: record.ttft_ns))
    if slo.itl_ms is not None:
        limits.append((slo.itl_ms * _NS_PER_MS, _tpot_or_none_needed_ns))
    if slo.min_tokens_per_s is not None:
        limits.append((1e9 / slo.min_tokens_per_s, _latency_per_token_ns))
    return limits


def _kept(judged: Sequence[Record], slo: SloPart) -> int | None:
    """How many requests were good; None without an SLO, or where a limit of it cannot be measured of any request."""
    limits = _limits(slo)
    if not limits:
        return None
    answered = [record for record in judged if record.ok]
    if answered and any(all(measure(one) is None for one in answered) for _, measure in limits):
        return None
    return sum(is_good(record, slo) for record in answered)


def _tpot_or_none_needed_ns(record: Record) -> float | None:
    """A single token, or all of them in a single piece, has no other after it that could be late."""
    return 0.0 if len(record.piece_ns) == 1 and record.output_tokens else tpot_ns(record)


def _latency_per_token_ns(record: Record) -> float | None:
    return record.latency_ns / record.output_tokens if record.output_tokens else None


def _ns_per_token(answered: Iterable[Record]) -> Iterable[float]:
    return (time for one in answered if (time := _latency_per_token_ns(one)) is not None)


def _gaps_ns(answered: Sequence[Record]) -> Times:
    """Between consecutive pieces of each stream, all in one."""
    streams = [one.piece_ns for one in answered if len(one.piece_ns) > 1]
    if not streams:
        return np.empty(0)
    gaps = np.diff(_times(chain.from_iterable(streams)))
    starts = np.cumsum([len(pieces) for pieces in streams[:-1]]) - 1
    # Not from the last piece of a stream to the first of the next.
    return np.delete(gaps, starts.astype(np.int64))


def _quantiles(values: Times) -> Quantiles:
    count = values.size
    if not count:
        return Quantiles(0, 0.0, 0.0, None, None, None, None, 0.0)
    ordered = np.sort(values)

    def at(percent: float) -> float | None:
        if count < NEEDED[percent]:
            return None
        return float(ordered[int(percent / 100 * (count - 1) + 0.5)])

    return Quantiles(
        count=count,
        mean=float(ordered.mean()),
        p50=float(ordered[int(0.5 * (count - 1) + 0.5)]),
        p90=at(90.0),
        p95=at(95.0),
        p99=at(99.0),
        p999=at(99.9),
        max=float(ordered[-1]),
    )


def _times(values: Iterable[float]) -> Times:
    return np.fromiter(values, dtype=np.float64)


def _per_s(count: float, window_s: float) -> float:
    return count / window_s if window_s > 0 else 0.0


def _optional_per_s(count: float | None, window_s: float) -> float | None:
    return None if count is None else _per_s(count, window_s)


def _total(values: Sequence[int | None]) -> int | None:
    """None where nothing is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cost_per_million(price: PricePart | None, count: float | None, window_s: float) -> float | None:
    """Of a million of what was counted in the window, at the price of the machine."""
    if price is None or not count:
        return None
    return price.per_hour * window_s / 3600 / count * 1e6
