"""The report of one run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._quantities import moment, quantity
from enginesmith_client.perf._run_files import SAMPLES_FILE, Run, SavedRun, load_run
from enginesmith_client.perf.observe._samples import Sample, read_samples
from enginesmith_client.perf.report._distribution_plots import distribution_plots, measured, times_of
from enginesmith_client.perf.report._figures import DEFINITIONS, figure_tables, slo_row, tiles_of
from enginesmith_client.perf.report._model import Code, Report, Section, Statement, Table
from enginesmith_client.perf.report._timeline_plots import timeline_plots

_LONGEST_VALUE = 300


def report_of_run(saved: SavedRun) -> Report:
    """Figures, plots and circumstances of a saved run.

    A run whose raw records are gone is reported without plots, and the report says so.
    """
    run = saved.run
    return Report(
        kind="run",
        title=run.title,
        subtitle=subtitle_of(run),
        verdict=verdict_of(run),
        reasons=reasons_of(run),
        tiles=tiles_of(run),
        sections=(
            *slo_section(run),
            Section("Figures", tables=figure_tables(run), void=run.void),
            _plots(saved),
            how_section(run),
            definitions_section(),
        ),
        results={"run": dataclasses.asdict(run)},
        void=run.void,
    )


def subtitle_of(run: Run) -> str:
    """What was measured, where and when."""
    version = f" version {run.model_version}" if run.model_version else ""
    return f"model {run.model}{version} at {run.url}, {moment(run.started)}, load by {run.generator}"


def verdict_of(run: Run) -> tuple[Statement, ...]:
    """May the numbers be believed; was the SLO kept."""
    return _belief(run), _promise(run)


def reasons_of(run: Run) -> tuple[Statement, ...]:
    """What the checks found, the worst first."""
    ordered = sorted(run.checks, key=lambda check: check.severity != "void")
    return tuple(
        Statement("void" if check.severity == "void" else "warning", f"{check.rule}: {check.words}")
        for check in ordered
    )


def slo_section(run: Run) -> tuple[Section, ...]:
    """The promises one by one; nothing where there are none."""
    if not run.slo:
        return ()
    rows = tuple(slo_row(verdict) for verdict in run.slo)
    table = Table("Promises", ("promise", "limit", "measured", "verdict"), rows)
    return (Section("The SLO", tables=(table,), void=run.void),)


def how_section(run: Run) -> Section:
    """All that is needed to measure the same again."""
    facts = [
        ("status", f"{run.status}: {run.ended_because}"),
        ("window", _window_words(run)),
        ("load generator", run.generator),
        ("model", f"{run.model}, version {run.model_version or 'as the server chooses'}"),
        ("server", run.url),
        ("started", moment(run.started)),
        ("digest of profile, model and version", run.profile_digest),
    ]
    tables = (
        Table("The run", ("", "value"), tuple(facts), words=True),
        *_mappings({"What was sent": run.workload}),
        *circumstances(run),
    )
    codes = [Code("The profile, as a file", profile_text(run.profile))]
    if run.command:
        codes.append(Code("The command of perf_analyzer", run.command))
    return Section("How it was measured", tables=tables, codes=tuple(codes))


def circumstances(run: Run) -> tuple[Table, ...]:
    """The server, the machine and the versions of everything."""
    server = {key: value for key, value in run.server.items() if isinstance(value, str | int | float)}
    return _mappings({"The server": server, "The machine": run.machine, "Versions": run.versions})


def circumstances_in(directory: Path, runs: Iterable[str]) -> tuple[Table, ...]:
    """Those of the first run that is there: the runs of a sweep or a comparison are made in one place."""
    for name in runs:
        try:
            return circumstances(load_run(directory / name).run)
        except ResultsError:
            continue
    return ()


def definitions_section() -> Section:
    """What each figure is."""
    return Section(
        "What the figures are",
        tables=(Table("Definitions", ("figure", "what it is"), DEFINITIONS, words=True),),
    )


def profile_text(profile: Mapping[str, Any]) -> str:
    """YAML that can be given to ``enginesmith bench --profile``; keys without a value are left out."""
    return yaml.safe_dump(_given(profile), sort_keys=False, allow_unicode=True, width=100)


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Rows of a nested mapping: keys joined by dots, long values cut."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
                words = ", ".join(value)
            if key.endswith("_bytes") and isinstance(value, int):
                words = quantity(value, "bytes")
            yield f"{prefix}{key}", words if len(words) <= _LONGEST_VALUE else f"{words[:_LONGEST_VALUE]} …"


def _mappings(named: Mapping[str, Mapping[str, Any]]) -> tuple[Table, ...]:
    tables = (
        Table(caption, ("", "value"), tuple(flattened(mapping)), words=True)
        for caption, mapping in named.items()
    )
    return tuple(table for table in tables if table.rows)


def _given(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner not in (None, {}, "")}
    if isinstance(value, list | tuple):
        return [_given(inner) for inner in value]
    return value


def _belief(run: Run) -> Statement:
    if run.void:
        return Statement("void", "Void. These numbers say nothing about the server and must not be used.")
    if run.status == "partial":
        return Statement("warning", f"Partial: the run was ended early ({run.ended_because}).")
    if run.checks:
        count = len(run.checks)
        return Statement(
            "warning",
            f"The numbers may be used with {'a reservation' if count == 1 else f'{count} reservations'}.",
        )
    return Statement("good", "The numbers may be believed: no check of the harness objects.")


def _promise(run: Run) -> Statement:
    if not run.slo:
        return Statement("plain", "No SLO was given.")
    if run.void:
        return Statement("void", "Whether the SLO was kept is not known: the run is void.")
    broken = [slo_row(verdict) for verdict in run.slo if verdict.met is False]
    if broken:
        listed = "; ".join(f"{name} is {seen}, {limit} is allowed" for name, limit, seen, _ in broken)
        return Statement("bad", f"The SLO was broken: {listed}.")
    unknown = [slo_row(verdict)[0] for verdict in run.slo if verdict.met is None]
    if unknown:
        return Statement(
            "warning", f"Whether the SLO was kept is not known: {', '.join(unknown)} could not be measured."
        )
    return Statement("good", "The SLO was kept.")


def _window_words(run: Run) -> str:
    window = run.window
    length = quantity((window.end_ns - window.start_ns) / 1e9, "s")
    start = quantity(window.start_ns / 1e9, "s")
    note = f": {window.note}" if window.note else ""
    return f"{length} from {start} on, {'steady' if window.steady else 'not steady'}{note}"


def _plots(saved: SavedRun) -> Section:
    run = saved.run
    try:
        records = saved.records()
    except ResultsError as error:
        return Section("Plots", words=(f"There are none: {error.message}.",))
    samples, words = _samples(saved)
    times = times_of(measured(run, records))
    plots = (*distribution_plots(run, times), *timeline_plots(run, records, samples))
    return Section("Plots", words=words, plots=plots, void=run.void)


def _samples(saved: SavedRun) -> tuple[list[Sample], tuple[str, ...]]:
    try:
        return read_samples(saved.directory / SAMPLES_FILE), ()
    except ResultsError as error:
        return [], (f"CPU and memory over time are missing: {error.message}.",)
