"""What ``bench`` prints of sweeps and suites, and the exit status that they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith_client.perf._sweep import Point, Sweep


def sweep_status(found: Sweep) -> int:
    """0: there are figures, and where an SLO was given a load that keeps it; else 1."""
    if not any(point.usable for point in found.points):
        return 1
    judged = any(point.slo for point in found.points)
    return 1 if judged and found.highest_within_slo is None else 0


def sweep_tables(found: Sweep) -> Iterator[Table]:
    """Every load in its order; the knee and the highest load within the SLO are marked."""
    from rich.table import Table

    from enginesmith_client.perf._quantities import quantity

    table = Table(title=found.title, title_justify="left")
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
