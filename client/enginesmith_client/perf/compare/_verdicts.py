"""From intervals to a verdict: which figures decide, what each says, and what all of them say together.

Every verdict is a statement about a whole interval, never about an estimate: ``worse`` when all of it is worse by more
than the minimum effect, ``same`` when all of it lies within the minimum effect, else ``inconclusive``. The figures that
can decide share one budget of error by Holm's procedure (A simple sequentially rejective multiple test procedure, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf.compare._bootstrap import Estimator, Interval
from enginesmith_client.perf.compare._comparison import (
    CompareOptions,
    MetricComparison,
    Role,
    Side,
    Verdict,
    percent_words,
)

GUARD_SAMPLES = 1000
"""Answers of each side, over all runs, that its p99 needs to be a guard: ten of them lie beyond it."""
_HOPELESS_FACTOR = 20
"""More rounds than so many times those measured are not worth the hint."""


@dataclass(frozen=True)
class Metric:
    """A figure that can be compared."""

    name: str
    title: str
    unit: str
    better: Literal["higher", "lower"]
    role: Role
    value: Callable[[Figures], float | None]


@dataclass(frozen=True)
class Values:
    """A metric with what was measured, one value of each side for each round or run."""

    metric: Metric
    a: tuple[float, ...]
    b: tuple[float, ...]


def metrics_of(*, closed: bool, streaming: bool, guarded: bool) -> tuple[Metric, ...]:
    """What is compared under this load, the deciding ones first.

    In a closed loop a slower server answers fewer requests, so throughput decides. In an open loop the throughput is
    what was offered, and only times can tell. ``guarded``: there are enough answers for p99 to be a guard.
    """
    throughput: Role = "primary" if closed else "informational"
    tail: Role = "guard" if guarded else "informational"
    shared = (
        _plain("good_per_s", "goodput", unit="requests/s", better="higher"),
        Metric("usage.server_rss_bytes", "server memory", "bytes", "lower", "informational", _server_rss),
    )
    if not streaming:
        return (
            _plain(
                "requests_per_s", "requests per second", unit="requests/s", better="higher", role=throughput
            ),
            _quantile("latency_ms.p50", "latency p50", role="primary"),
            _quantile("latency_ms.p99", "latency p99", role=tail),
            *shared,
        )
    return (
        _plain(
            "output_tokens_per_s",
            "output tokens per second",
            unit="tokens/s",
            better="higher",
            role=throughput,
        ),
        _quantile("ttft_ms.p50", "time to first token p50", role="primary"),
        _quantile("tpot_ms.p50", "time per output token p50", role="primary"),
        _quantile("ttft_ms.p99", "time to first token p99", role=tail),
        _plain("requests_per_s", "requests per second", unit="requests/s", better="higher"),
        _quantile("latency_ms.p50", "latency p50"),
        _quantile("latency_ms.p99", "latency p99"),
        *shared,
    )


def judged(
    values: Sequence[Values],
    estimator: Callable[[Values], Estimator | None],
    *,
    options: CompareOptions,
) -> tuple[MetricComparison, ...]:
    """Every metric with its interval and verdict; those for which there is no estimator are left out.

    Primaries and guards share ``1 - options.confidence``: as long as k of them are undecided, each gets an interval of
    confidence 1 - (1 - confidence) / k, and those that decide keep theirs. To be ``same`` is no discovery: all of them must
    be, so each needs only ``options.confidence`` (an intersection-union test), as informational ones do.
    """
    made = {item.metric.name: estimator(item) for item in values}
    estimators = {name: one for name, one in made.items() if one is not None}
    values = [item for item in values if item.metric.name in estimators]

    def at(item: Values, confidence: float) -> MetricComparison:
        return _compared(item, estimators[item.metric.name].interval(confidence), options)

    alone = {item.metric.name: at(item, options.confidence) for item in values}
    undecided = [item for item in values if item.metric.role != "informational"]
    decided: dict[str, MetricComparison] = {}
    while undecided:
        tried = [at(item, 1 - (1 - options.confidence) / len(undecided)) for item in undecided]
        found = [metric for metric in tried if metric.verdict in ("better", "worse")]
        if not found:
            decided |= {
                metric.name: alone[metric.name] if alone[metric.name].verdict == "same" else metric
                for metric in tried
            }
            break
        decided |= {metric.name: metric for metric in found}
        undecided = [item for item in undecided if item.metric.name not in decided]
    return tuple((alone | decided)[item.metric.name] for item in values)


def errors_verdict(a: Side, b: Side, *, confidence: float) -> tuple[Verdict, str]:
    """``worse`` when B fails and A never does, or B fails more often than chance explains; else ``same``."""
    if not b.failed:
        return "same", ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(b.errors.items()))
    seen = f"{b.failed} of {b.requests} requests of B failed ({kinds}), {a.failed} of {a.requests} of A"
    if not a.failed:
        return "worse", f"{seen}"
    chance = _chance_of_as_many(b.failed, a.failed + b.failed, b.requests / (a.requests + b.requests))
    return ("worse", f"{seen}, more than chance explains") if chance <= 1 - confidence else ("same", "")


def overall(metrics: Sequence[MetricComparison], errors: tuple[Verdict, str]) -> tuple[Verdict, str]:
    """The verdict of the comparison and what decided it, in words."""
    primaries = [metric for metric in metrics if metric.role == "primary"]
    against = [metric for metric in metrics if metric.role != "informational" and metric.verdict == "worse"]
    if errors[0] == "worse" or against:
        reasons = [errors[1]] if errors[0] == "worse" else []
        reasons += [f"{metric.title} {metric.words}" for metric in against]
        gained = [metric.title for metric in primaries if metric.verdict == "better"]
        reasons += [f"(better, however: {', '.join(gained)})"] if gained else []
        return "worse", "B is worse: " + "; ".join(reasons)
    if not primaries:
        return "inconclusive", "nothing that decides was measured"
    better = [metric for metric in primaries if metric.verdict == "better"]
    if better and not any(metric.could_be_worse for metric in primaries):
        return "better", "B is better: " + "; ".join(f"{metric.title} {metric.words}" for metric in better)
    if all(metric.verdict == "same" for metric in primaries):
        band = primaries[0].min_effect_percent
        return "same", f"B is the same as A: no deciding figure differs by more than {band:g}%"
    open_ones = [metric for metric in primaries if metric.verdict == "inconclusive"]
    return "inconclusive", "Not decided: " + "; ".join(
        f"{metric.title}, {metric.words}" for metric in open_ones
    )


def rounds_hint(metrics: Sequence[MetricComparison], *, rounds: int, unit: str) -> str:
    """How many rounds (or how much of ``unit``) would probably decide what is open; empty when nothing is.

    An interval shrinks with the square root of the rounds; what is needed is that it no longer reaches the nearer end of
    the band. The estimate itself will move, hence a quarter more.
    """
    factors = [
        _needed_factor(metric)
        for metric in metrics
        if metric.role == "primary" and metric.verdict == "inconclusive"
    ]
    if not factors:
        return ""
    factor = max(factors)
    if factor > _HOPELESS_FACTOR:
        return (
            "the difference is about as large as the minimum effect, so more measuring would hardly decide: choose another "
            "minimum effect, or live with not knowing"
        )
    return f"about {math.ceil(rounds * factor)} {unit} instead of {rounds} would probably decide; start anew, in a new directory"


def _needed_factor(metric: MetricComparison) -> float:
    estimate, half = math.log(metric.ratio), math.log(metric.high / metric.low) / 2
    distance = abs(abs(estimate) - math.log1p(metric.min_effect_percent / 100))
    return 1.25 * (half / distance) ** 2 if distance > 0 else math.inf


def _compared(item: Values, interval: Interval, options: CompareOptions) -> MetricComparison:
    metric = item.metric
    effect = options.guard_effect_percent if metric.role == "guard" else options.min_effect_percent
    words = (
        f"{percent_words(interval.estimate)} ({100 * interval.confidence:.3g}% interval: "
        f"{percent_words(interval.low)} to {percent_words(interval.high)})"
    )
    compared = MetricComparison(
        name=metric.name,
        title=metric.title,
        unit=metric.unit,
        better=metric.better,
        role=metric.role,
        a=_geometric_mean(item.a),
        b=_geometric_mean(item.b),
        ratio=math.exp(interval.estimate),
        low=math.exp(interval.low),
        high=math.exp(interval.high),
        confidence=interval.confidence,
        min_effect_percent=effect,
        verdict="inconclusive",
        words=words,
        values_a=item.a,
        values_b=item.b,
    )
    return replace(compared, verdict=_verdict(compared))


def _verdict(metric: MetricComparison) -> Verdict:
    low, high = metric.band
    if metric.low >= low and metric.high <= high:
        return "same"
    if metric.low > high:
        return "better" if metric.better == "higher" else "worse"
    if metric.high < low:
        return "worse" if metric.better == "higher" else "better"
    return "inconclusive"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _chance_of_as_many(failed: int, of: int, share: float) -> float:
    """P(X >= failed) for X binomial: how failures would fall on B if both failed equally often."""
    logs = [
        math.lgamma(of + 1)
        - math.lgamma(k + 1)
        - math.lgamma(of - k + 1)
        + k * math.log(share)
        + (of - k) * math.log1p(-share)
        for k in range(failed, of + 1)
    ]
    return math.fsum(math.exp(log) for log in logs)


def _plain(
    name: str,
    title: str,
    *,
    unit: str,
    better: Literal["higher", "lower"],
    role: Role = "informational",
) -> Metric:
    def value(figures: Figures) -> float | None:
        found: float | None = getattr(figures, name)
        return found

    return Metric(name, title, unit, better, role, value)


def _quantile(name: str, title: str, *, role: Role = "informational") -> Metric:
    times_name, _, quantile = name.partition(".")

    def value(figures: Figures) -> float | None:
        times = getattr(figures, times_name)
        found: float | None = None if times is None else getattr(times, quantile)
        return found

    return Metric(name, title, "ms", "lower", role, value)


def _server_rss(figures: Figures) -> float | None:
    return None if figures.usage is None else figures.usage.server_rss_bytes


def error_totals(figures: Sequence[Figures]) -> Mapping[str, int]:
    """Failures by kind over several runs."""
    totals: dict[str, int] = {}
    for one in figures:
        for kind, count in one.errors.items():
            totals[kind] = totals.get(kind, 0) + count
    return {kind: count for kind, count in sorted(totals.items()) if count}
