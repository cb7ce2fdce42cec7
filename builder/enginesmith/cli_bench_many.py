"""What ``bench`` prints of sweeps and suites, and the exit status that they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from enginesmith.cli_bench_output import status_of

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith_client.perf._run_files import Run
    from enginesmith_client.perf.many._suite import SuiteResult
    from enginesmith_client.perf.many._sweep import Point, Sweep


def sweep_status(found: Sweep) -> int:
    """0: there are figures, and where an SLO was given a load that keeps it; else 1."""
    if not any(point.usable for point in found.points):
        return 1
    judged = any(point.slo for point in found.points)
    return 1 if judged and found.highest_within_slo is None else 0


def sweep_tables(found: Sweep) -> Iterator[Table | str]:
    """Every load in its order; the knee and the highest load within the SLO are marked."""
    from rich.table import Table

    from enginesmith_client.perf._quantities import quantity

    yield found.title
    table = Table()
    for heading in ("load", "requests", "tokens", "p50", "p99", "first token p99", "goodput", "SLO", ""):
        table.add_column(heading, justify="left" if heading in ("SLO", "") else "right", overflow="fold")
    for point in found.points:
        table.add_row(
            point.name,
            quantity(point.throughput_per_s, "per_s"),
            quantity(point.output_tokens_per_s, "per_s"),
            *(quantity(value, "ms") for value in (point.p50_ms, point.p99_ms, point.ttft_p99_ms)),
            quantity(point.good_per_s, "per_s"),
            _kept(point),
            _mark(found, point),
        )
    yield table


def suite_runs(found: SuiteResult, directory: Path) -> dict[str, Run]:
    """The runs of the scenarios that were measured, by their names.

    Raises:
        ResultsError: one cannot be read.
    """
    from enginesmith_client.perf._run_files import load_run

    return {
        entry.name: load_run(directory / entry.directory).run for entry in found.scenarios if entry.directory
    }


def suite_tables(found: SuiteResult, runs: Mapping[str, Run]) -> Iterator[Table | str]:
    """Every scenario in its order, with its main figures or why it has none."""
    from rich.table import Table

    yield f"suite {found.name}: {found.model} version {found.model_version}"
    table = Table()
    for heading in ("scenario", "requests", "tokens", "p50", "p99", "first token p99", ""):
        table.add_column(heading, justify="left" if heading in ("scenario", "") else "right", overflow="fold")
    for entry in found.scenarios:
        run = runs.get(entry.name)
        figures = ("",) * 5 if run is None else _main_figures(run)
        words = f"{entry.status}: {entry.reason}" if run is None else _words(run)
        table.add_row(entry.name, *figures, words)
        for note in entry.notes:
            table.add_row("", "", "", "", "", "", note)
    yield table


def _main_figures(run: Run) -> tuple[str, ...]:
    from enginesmith_client.perf._quantities import quantity

    figures = run.figures
    latency, ttft = figures.latency_ms, figures.ttft_ms
    return (
        quantity(figures.requests_per_s, "per_s"),
        quantity(figures.output_tokens_per_s, "per_s"),
        quantity(latency.p50 if latency else None, "ms"),
        quantity(latency.p99 if latency else None, "ms"),
        quantity(ttft.p99 if ttft else None, "ms"),
    )


def _words(run: Run) -> str:
    if run.void:
        return "VOID"
    if status_of(run):
        return "partial" if run.status == "partial" else "SLO MISSED" if run.slo_met is False else "see below"
    return ", ".join(sorted({check.rule for check in run.checks}))


def _kept(point: Point) -> str:
    if not point.slo:
        return ""
    return "?" if point.slo_met is None else "kept" if point.slo_met else "MISSED"


def _mark(found: Sweep, point: Point) -> str:
    if point.void:
        return f"VOID: {point.void}"
    marks = []
    if found.knee is not None and point.load == found.knee.load:
        marks.append("knee")
    if found.highest_within_slo is not None and point.load == found.highest_within_slo.load:
        marks.append("highest load that fits")
    if not point.sustained:
        marks.append("does not keep up")
    return ", ".join(marks)
