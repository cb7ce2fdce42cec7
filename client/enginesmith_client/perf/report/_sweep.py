"""The report of a sweep: the curve of throughput and latency, its knee, what the SLO allows, and every point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from enginesmith_client.perf._quantities import NOTHING, Unit, moment, quantity
from enginesmith_client.perf.many._sweep import Point, Sweep, load_sweep
from enginesmith_client.perf.report._model import Code, Report, Section, Statement, Table, Tile
from enginesmith_client.perf.report._plots import Axis, Lines, Mark, Plot, Series, Spot
from enginesmith_client.perf.report._run import circumstances_in, definitions_section, profile_text


def report_of_sweep(directory: Path) -> Report:
    """What a sweep found. Errors as ``load_sweep``."""
    swept = load_sweep(directory)
    usable = [point for point in swept.points if point.usable]
    return Report(
        kind="sweep",
        title=swept.title,
        subtitle=f"model {swept.model} version {swept.model_version} at {swept.url}, {moment(swept.started)}",
        verdict=_verdict(swept, usable),
        reasons=tuple(Statement("plain", words) for words in swept.words),
        tiles=_tiles(swept),
        sections=(
            Section("Plots", plots=_plots(swept, usable)),
            Section("Points", tables=(_table(swept),), statements=_void_points(swept)),
            Section(
                "How it was measured",
                tables=circumstances_in(directory, [point.directory for point in swept.points]),
                codes=(Code("The profile", profile_text(swept.profile)),),
            ),
            definitions_section(),
        ),
        results={"sweep": dataclasses.asdict(swept)},
        void=not usable,
    )


def _verdict(swept: Sweep, usable: Sequence[Point]) -> tuple[Statement, ...]:
    statements = []
    lost = len(swept.points) - len(usable)
    if not usable:
        statements.append(Statement("void", "Void. No point of this sweep says anything about the server."))
    elif lost:
        statements.append(
            Statement("warning", f"{lost} of {len(swept.points)} points are void and were not used.")
        )
    else:
        statements.append(Statement("good", f"The numbers of all {len(usable)} points may be believed."))
    if swept.status == "partial":
        statements.append(
            Statement(
                "warning", "The sweep is not finished; it goes on where it was when it is started again."
            )
        )
    if usable and any(point.slo for point in swept.points):
        best = swept.highest_within_slo
        statements.append(
            Statement("good", f"Within the SLO: up to {best.name}.")
            if best
            else Statement("bad", "No load that was measured keeps the SLO.")
        )
    return tuple(statements)


def _tiles(swept: Sweep) -> tuple[Tile, ...]:
    tiles = []
    if swept.highest_within_slo:
        best = swept.highest_within_slo
        note = f"{quantity(best.throughput_per_s, 'per_s')}, p99 {quantity(best.p99_ms, 'ms')}"
        tiles.append(Tile("Highest load within the SLO", best.name, note))
    if swept.best_goodput:
        goodput = swept.best_goodput
        tiles.append(Tile("Most goodput", quantity(goodput.good_per_s, "per_s"), f"at {goodput.name}"))
    if swept.knee:
        knee = swept.knee
        note = f"{quantity(knee.throughput_per_s, 'per_s')}, mean {quantity(knee.latency_ms, 'ms')}"
        tiles.append(Tile("Knee" if knee.reached else "Knee, or beyond", _load(swept, knee.load), note))
    most = max(
        (point for point in swept.points if point.usable), key=lambda one: one.throughput_per_s, default=None
    )
    if most:
        tiles.append(Tile("Most throughput", quantity(most.throughput_per_s, "per_s"), f"at {most.name}"))
    return tuple(tiles)


def _load(swept: Sweep, load: float) -> str:
    return next((point.name for point in swept.points if point.load == load), f"{load:g}")


def _plots(swept: Sweep, usable: Sequence[Point]) -> tuple[Plot, ...]:
    if not usable:
        return ()
    plots: list[Plot] = [_curve(swept, usable)]
    load = Axis("in flight" if swept.axis == "concurrency" else "offered, requests per second", "plain")
    answered = _series("throughput", usable, lambda point: point.load, lambda point: point.throughput_per_s)
    good = _series("goodput", usable, lambda point: point.load, lambda point: point.good_per_s)
    series = (answered, good) if any(value is not None for value in good.y) else (answered,)
    plots.append(
        Lines(
            title="Throughput by load",
            words=_range_words(answered, "per_s"),
            x=load,
            y=Axis("requests per second", "per_s"),
            series=series,
        )
    )
    first = _series("p50", usable, lambda point: point.load, lambda point: point.ttft_p50_ms)
    if any(value is not None for value in first.y):
        last = _series("p99", usable, lambda point: point.load, lambda point: point.ttft_p99_ms)
        limit = swept.profile.get("slo", {}).get("ttft_ms")
        plots.append(
            Lines(
                title="Time to first token by load",
                words=_range_words(first, "ms"),
                x=load,
                y=Axis("TTFT, logarithmic", "ms", log=True),
                series=(first, last),
                marks=(Mark("y", limit, f"SLO {quantity(limit, 'ms')}", "bad"),) if limit else (),
            )
        )
    return tuple(plots)


def _curve(swept: Sweep, usable: Sequence[Point]) -> Lines:
    p50 = _series("p50", usable, lambda point: point.throughput_per_s, lambda point: point.p50_ms)
    p99 = _series("p99", usable, lambda point: point.throughput_per_s, lambda point: point.p99_ms)
    named = dataclasses.replace(p50, short_labels=tuple(f"{point.load:g}" for point in usable))
    limit = swept.profile.get("slo", {}).get("p99_latency_ms")
    knee = next((one for one in usable if swept.knee and one.load == swept.knee.load and one.p50_ms), None)
    spots = (Spot(knee.throughput_per_s, knee.p50_ms, "knee"),) if knee and knee.p50_ms else ()
    return Lines(
        title="Throughput and latency",
        words=f"each point is a load ({swept.axis}); "
        + "; ".join(
            f"{one.name}: {quantity(one.throughput_per_s, 'per_s')}, p99 {quantity(one.p99_ms, 'ms')}"
            for one in usable
        ),
        x=Axis("answered requests per second", "per_s"),
        y=Axis("latency, logarithmic", "ms", log=True),
        series=(named, p99),
        marks=(Mark("y", limit, f"SLO for p99: {quantity(limit, 'ms')}", "bad"),) if limit else (),
        spots=spots,
    )


def _range_words(series: Series, unit: Unit) -> str:
    known = [value for value in series.y if value is not None]
    return f"{series.name} from {quantity(min(known), unit)} to {quantity(max(known), unit)}"


def _series(
    name: str, points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point], float | None]
) -> Series:
    labels = tuple(
        f"{point.name}: {quantity(point.throughput_per_s, 'per_s')}, p50 {quantity(point.p50_ms, 'ms')}, "
        f"p99 {quantity(point.p99_ms, 'ms')}"
        for point in points
    )
    return Series(name, tuple(map(x, points)), tuple(map(y, points)), labels=labels)


def _table(swept: Sweep) -> Table:
    kept = {True: "kept", False: "broken", None: NOTHING}
    rows = tuple(
        (
            point.name,
            quantity(point.throughput_per_s, "per_s"),
            quantity(point.output_tokens_per_s, "per_s"),
            quantity(point.p50_ms, "ms"),
            quantity(point.p99_ms, "ms"),
            quantity(point.ttft_p50_ms, "ms"),
            quantity(point.good_per_s, "per_s"),
            f"{sum(point.errors.values()):,}",
            kept[point.slo_met],
        )
        for point in swept.points
    )
    void = frozenset(number for number, point in enumerate(swept.points) if point.void)
    columns = ("load", "requests", "tokens", "p50", "p99", "TTFT p50", "goodput", "failed", "SLO")
    return Table("Every load", columns, rows, void_rows=void)


def _void_points(swept: Sweep) -> tuple[Statement, ...]:
    return tuple(Statement("void", f"{point.name}: {point.void}") for point in swept.points if point.void)
