"""The report of a suite: all scenarios in one table, then each with its verdict, its times and its plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._quantities import NOTHING, moment
from enginesmith_client.perf._run_files import Run, SavedRun, load_run
from enginesmith_client.perf.many._suite import SuiteEntry, SuiteResult, load_suite_result
from enginesmith_client.perf.report._distribution_plots import distribution_plots, measured, times_of
from enginesmith_client.perf.report._figures import SHORT_COLUMNS, figure_tables, short_row
from enginesmith_client.perf.report._model import Report, Section, Statement, Table, Tile
from enginesmith_client.perf.report._plots import Plot, Tone
from enginesmith_client.perf.report._run import circumstances, definitions_section, reasons_of, verdict_of


def report_of_suite(directory: Path) -> Report:
    """What became of every scenario. Errors as ``load_suite_result``, and as ``load_run`` of a run that is named."""
    suite = load_suite_result(directory)
    saved = {
        entry.name: load_run(directory / entry.directory) for entry in suite.scenarios if entry.directory
    }
    runs = {name: one.run for name, one in saved.items()}
    first = next(iter(runs.values()), None)
    return Report(
        kind="suite",
        title=f"suite {suite.name}: {suite.model}",
        subtitle=f"model {suite.model} version {suite.model_version} ({suite.kind}) at {suite.url}, {moment(suite.started)}",
        verdict=_verdict(suite, runs),
        reasons=_reasons(suite),
        tiles=_tiles(suite, runs),
        sections=(
            Section("Scenarios", tables=(_table(suite, runs),)),
            *(_scenario(entry, saved[entry.name]) for entry in suite.scenarios if entry.name in saved),
            Section("How it was measured", tables=circumstances(first) if first else ()),
            definitions_section(),
        ),
        results={
            "suite": dataclasses.asdict(suite),
            "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
        },
        void=bool(runs) and all(run.void for run in runs.values()),
    )


def _verdict(suite: SuiteResult, runs: Mapping[str, Run]) -> tuple[Statement, ...]:
    void = [name for name, run in runs.items() if run.void]
    broken = [name for name, run in runs.items() if run.slo_met is False]
    statements = []
    if not runs:
        statements.append(Statement("warning", "Nothing was measured."))
    elif void:
        all_void = len(void) == len(runs)
        words = f"Void: {', '.join(void)}. These numbers say nothing about the server and must not be used."
        statements.append(Statement("void" if all_void else "warning", words))
    else:
        statements.append(
            Statement(
                "good", "No scenario is void: the numbers may be believed, with the reservations below."
            )
        )
    if broken:
        statements.append(Statement("bad", f"The SLO was broken in: {', '.join(broken)}."))
    elif any(run.slo_met for run in runs.values()):
        statements.append(Statement("good", "The SLO was kept wherever there is one that could be judged."))
    if suite.status == "partial":
        words = "The suite is not finished; it goes on where it was when it is started again."
        statements.append(Statement("warning", words))
    return tuple(statements)


def _reasons(suite: SuiteResult) -> tuple[Statement, ...]:
    tones: Mapping[str, Tone] = {"failed": "bad", "skipped": "plain"}
    return tuple(
        Statement(tones[entry.status], f"{entry.name}, {entry.status}: {entry.reason}")
        for entry in suite.scenarios
        if entry.status != "measured"
    )


def _tiles(suite: SuiteResult, runs: Mapping[str, Run]) -> tuple[Tile, ...]:
    counts = {
        status: sum(entry.status == status for entry in suite.scenarios) for status in ("skipped", "failed")
    }
    return (
        Tile("Measured", str(len(runs)), f"of {len(suite.scenarios)} scenarios"),
        Tile("Void", str(sum(run.void for run in runs.values()))),
        Tile("SLO kept", str(sum(run.slo_met is True for run in runs.values()))),
        Tile("SLO broken", str(sum(run.slo_met is False for run in runs.values()))),
        Tile("Skipped", str(counts["skipped"])),
        Tile("Failed", str(counts["failed"])),
    )


def _table(suite: SuiteResult, runs: Mapping[str, Run]) -> Table:
    rows: list[tuple[str, ...]] = []
    void = set()
    for number, entry in enumerate(suite.scenarios):
        run = runs.get(entry.name)
        if run is not None and run.void:
            void.add(number)
        figures = short_row(run) if run is not None else (NOTHING,) * len(SHORT_COLUMNS)
        state = "void" if run is not None and run.void else entry.status
        rows.append((f"{entry.name} ({state})" if state != "measured" else entry.name, *figures))
    return Table("All scenarios", ("scenario", *SHORT_COLUMNS), tuple(rows), void_rows=frozenset(void))


def _scenario(entry: SuiteEntry, saved: SavedRun) -> Section:
    run = saved.run
    return Section(
        f"{entry.name}: {entry.title}",
        words=tuple(words for words in (entry.why, *entry.notes) if words),
        statements=(*verdict_of(run), *reasons_of(run)),
        tables=figure_tables(run),
        plots=_plots(saved),
        void=run.void,
    )


def _plots(saved: SavedRun) -> tuple[Plot, ...]:
    try:
        records = saved.records()
    except ResultsError:
        return ()
    return distribution_plots(saved.run, times_of(measured(saved.run, records)))
