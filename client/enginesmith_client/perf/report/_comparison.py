"""The report of a comparison: the verdict on B, the intervals, the rounds, and both distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._quantities import NOTHING, Unit, moment, quantity
from enginesmith_client.perf._run_files import load_run
from enginesmith_client.perf.compare._comparison import Comparison, MetricComparison, Verdict, load_comparison
from enginesmith_client.perf.report._distribution_plots import Values, latency_cdf, measured, times_of
from enginesmith_client.perf.report._model import Code, Report, Section, Statement, Table, Tile
from enginesmith_client.perf.report._plots import Axis, Forest, ForestRow, Lines, Mark, Plot, Series, Tone
from enginesmith_client.perf.report._run import circumstances_in, definitions_section, profile_text

_TONES: Mapping[Verdict, Tone] = {"better": "good", "same": "good", "worse": "bad", "inconclusive": "warning"}
_ROW_TONES: Mapping[Verdict, Tone] = {
    "better": "good",
    "same": "plain",
    "worse": "bad",
    "inconclusive": "warning",
}
UNITS: Mapping[str, Unit] = {"ms": "ms", "requests/s": "per_s", "tokens/s": "per_s", "bytes": "bytes"}
"""Units of compared figures, as quantities know them."""


def report_of_comparison(directory: Path) -> Report:
    """What a comparison found. Errors as ``load_comparison``."""
    compared = load_comparison(directory)
    void = bool(compared.void)
    return Report(
        kind="comparison",
        title=compared.title,
        subtitle=f"A: {_side(compared, 'a')}. B: {_side(compared, 'b')}. {moment(compared.started)}",
        verdict=_verdict(compared),
        reasons=_reasons(compared),
        tiles=tuple(
            Tile(metric.title, quantity(metric.ratio, "change"), f"B against A: {metric.verdict}")
            for metric in compared.metrics
            if metric.role == "primary"
        ),
        sections=(
            Section("Plots", plots=_plots(directory, compared), void=void),
            Section("Figures", tables=(*_figures(compared), _answers(compared)), void=void),
            _how(directory, compared),
            definitions_section(),
        ),
        results={"comparison": dataclasses.asdict(compared)},
        void=void,
    )


def _side(compared: Comparison, name: str) -> str:
    side = compared.a if name == "a" else compared.b
    return f"{side.title} (model {side.model} version {side.model_version} at {side.url})"


def _verdict(compared: Comparison) -> tuple[Statement, ...]:
    if compared.void:
        return (Statement("void", "Void. These numbers say nothing about the difference of A and B."),)
    words = compared.words
    if compared.verdict not in words:
        words = f"{compared.verdict.capitalize()}. {words}"
    return (Statement(_TONES[compared.verdict], words),)


def _reasons(compared: Comparison) -> tuple[Statement, ...]:
    said = [Statement("void", words) for words in compared.void]
    said += [Statement("warning", words) for words in compared.warnings]
    if compared.hint:
        said.append(Statement("plain", compared.hint))
    return tuple(said)


def _plots(directory: Path, compared: Comparison) -> tuple[Plot, ...]:
    plots: list[Plot] = []
    if compared.metrics:
        plots.append(_forest(compared))
    plots += _latencies(directory, compared)
    plots += [
        _rounds(metric)
        for metric in compared.metrics
        if metric.role == "primary" and len(metric.values_a) > 1
    ]
    return tuple(plots)


def _forest(compared: Comparison) -> Forest:
    rows = tuple(
        ForestRow(
            name=metric.title,
            ratio=metric.ratio,
            low=metric.low,
            high=metric.high,
            verdict=metric.verdict,
            tone=_ROW_TONES[metric.verdict],
            band_low=metric.band[0],
            band_high=metric.band[1],
            note=_note(metric),
        )
        for metric in compared.metrics
    )
    words = "; ".join(f"{metric.title}: {metric.words}, {metric.verdict}" for metric in compared.metrics)
    return Forest("B against A, with intervals", f"{words}. Shaded: too small to matter", rows)


def _note(metric: MetricComparison) -> str:
    if metric.role == "informational":
        return "decides nothing"
    return f"{'guard, ' if metric.role == 'guard' else ''}{metric.better} is better"


def _latencies(directory: Path, compared: Comparison) -> list[Plot]:
    """Both distributions, of all rounds together; nothing where the records are gone."""
    try:
        both = {"A": _pooled(directory, compared.a.runs), "B": _pooled(directory, compared.b.runs)}
    except ResultsError:
        return []
    if not all(values.size for values in both.values()):
        return []
    return [latency_cdf(both, compared.profile.get("slo", {}))]


def _pooled(directory: Path, runs: tuple[str, ...]) -> Values:
    saved = [load_run(directory / run) for run in runs]
    records = chain.from_iterable(measured(one.run, one.records()) for one in saved)
    return np.sort(times_of(list(records)).latency)


def _rounds(metric: MetricComparison) -> Lines:
    ratios = [b / a for a, b in zip(metric.values_a, metric.values_b, strict=True) if a]
    low, high = metric.band
    rounds = tuple(float(number) for number in range(1, len(ratios) + 1))
    return Lines(
        title=f"{metric.title}: B against A, round by round",
        words=f"{len(ratios)} rounds, from {quantity(min(ratios), 'change')} to {quantity(max(ratios), 'change')}",
        x=Axis("round", "plain", ends=(0.5, len(ratios) + 0.5)),
        y=Axis("B against A", "change", from_zero=False),
        series=(Series("B against A", rounds, tuple(ratios)),),
        marks=(
            Mark("y", 1.0, ""),
            Mark("y", high, "minimum effect"),
            Mark("y", low, ""),
        ),
    )


def _figures(compared: Comparison) -> tuple[Table, ...]:
    """Nothing where no pair of runs could be used."""
    if not compared.metrics:
        return ()
    rows = tuple(
        (
            metric.title,
            quantity(metric.a, UNITS.get(metric.unit, "plain")),
            quantity(metric.b, UNITS.get(metric.unit, "plain")),
            quantity(metric.ratio, "change"),
            f"{quantity(metric.low, 'change')} to {quantity(metric.high, 'change')}",
            f"{metric.confidence:.1%}",
            f"±{metric.min_effect_percent:g}%",
            metric.role,
            metric.verdict,
        )
        for metric in compared.metrics
    )
    columns = ("figure", "A", "B", "difference", "interval", "confidence", "matters from", "role", "verdict")
    return (Table("B against A", columns, rows),)


def _answers(compared: Comparison) -> Table:
    rows = tuple(
        (
            name,
            f"{side.requests:,}",
            f"{side.failed:,}",
            ", ".join(f"{kind} {count:,}" for kind, count in side.errors.items()) or NOTHING,
        )
        for name, side in (("A", compared.a), ("B", compared.b))
    )
    return Table("Requests", ("", "requests", "failed", "failures by kind"), rows)


def _how(directory: Path, compared: Comparison) -> Section:
    options = compared.options
    facts = [
        ("method", compared.method),
        (
            "kind",
            "live: rounds in turn on running servers" if compared.kind == "live" else "two saved results",
        ),
        ("confidence of all statements together", f"{options.confidence:.1%}"),
        ("minimum effect", f"{options.min_effect_percent:g}% (guards: {options.guard_effect_percent:g}%)"),
        ("resamples, seed", f"{options.resamples:,}, {options.seed}"),
        ("started", moment(compared.started)),
    ]
    if compared.rounds:
        facts += [("rounds", str(compared.rounds)), ("order of the rounds", " ".join(compared.order))]
    facts += [(f"round {number}, not used", why) for number, why in compared.left_out.items()]
    return Section(
        "How it was measured",
        tables=(
            Table("The comparison", ("", "value"), tuple(facts), words=True),
            *circumstances_in(directory, compared.a.runs),
        ),
        codes=(Code("The profile", profile_text(compared.profile)),),
    )
