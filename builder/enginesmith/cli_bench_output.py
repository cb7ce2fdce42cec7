"""What ``bench`` prints of a run on stdout, for people, and the exit status that it means."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from enginesmith.cli_options import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith_client.perf._figures import Figures, Quantiles
    from enginesmith_client.perf._run_files import Run, SloVerdict

_COMMAND = "command: "
INTERRUPTED = 130
"""Exit status of what was ended by Ctrl-C, as of every verb."""


@dataclass(frozen=True)
class Outcome:
    """What was measured, and what it means."""

    status: int
    """The exit status."""
    reasons: tuple[str, ...]
    """Why it is not 0, a line each; for people."""
    shown: tuple[Table | str, ...]
    """For stdout."""


def tell(outcome: Outcome, directory: Path, *, as_json: bool) -> int:
    """Print what was measured, write its report into ``directory``, and return the exit status."""
    # First what was measured: it must be seen also where no report can be written.
    if not as_json:
        _print(outcome.shown)
    for reason in outcome.reasons:
        click.echo(reason, err=True)
    if as_json:
        results = json.loads(page(directory, "json"))
        print_json({"exit_status": outcome.status, "directory": directory} | results)
    click.echo(f"report: {write_pages(directory)[0]}", err=True)
    return outcome.status


def page(directory: Path, form: Literal["html", "md", "json"]) -> str:
    """The report of ``directory`` as text that ends with a line break.

    Raises:
        ResultsError: there are no results in it.
    """
    from enginesmith_client.perf.report import _report

    if form == "json":
        text = json.dumps(_report.as_json(directory), indent=2)
    else:
        text = _report.html(directory) if form == "html" else _report.markdown(directory)
    return text.rstrip("\n") + "\n"


def write_pages(directory: Path) -> tuple[Path, ...]:
    """Write ``report.html`` and ``report.md`` beside the results; where they are.

    Raises:
        ResultsError: there are no results, or a page cannot be written.
    """
    from enginesmith_client.perf._saved_files import appearing

    forms: tuple[Literal["html", "md"], ...] = ("html", "md")
    for form in forms:
        text = page(directory, form)
        with appearing(directory / f"report.{form}") as staging:
            staging.write_text(text, encoding="utf-8")
    return tuple(directory / f"report.{form}" for form in forms)


def differing_figures(written: Figures, computed: Figures) -> Iterator[tuple[str, object, object]]:
    """The figures that differ by more than what writing them as JSON costs: name, and both values."""
    there, again = (dict(_flat(asdict(figures))) for figures in (written, computed))
    for name in sorted(there.keys() | again.keys()):
        a, b = there.get(name), again.get(name)
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        if not (math.isclose(a, b, rel_tol=1e-9) if numbers else a == b):  # type: ignore[arg-type]
            yield name, a, b


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """``latency_ms.p50`` and its value, for every value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _print(shown: tuple[Table | str, ...]) -> None:
    from rich.console import Console

    # A pipe has no width of its own; a table must not be cut there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for one in shown:
        # In a pipe no line is broken, and on a terminal not the command, which is there to be copied.
        whole = isinstance(one, str) and (not console.is_terminal or one.startswith(_COMMAND))
        console.print(one, markup=False, highlight=False, soft_wrap=whole)


def status_of(run: Run) -> int:
    """0: it may be believed and kept its SLO; 130: interrupted; 1: everything else."""
    if run.interrupted:
        return INTERRUPTED
    return 1 if run.status == "partial" or any(_reasons(run)) else 0


def status_words(run: Run) -> Iterator[str]:
    """Why the exit status of ``run`` is not 0, a line each. The words of the checks stand in the table of checks."""
    if run.status == "partial":
        yield f"{run.title}: partial: {run.ended_because}; what was measured is kept"
    yield from (f"{run.title}: {reason}" for reason in _reasons(run))


def run_tables(run: Run) -> Iterator[Table | str]:
    """Figures, distributions, checks and promises of one run; the first line says so where the figures are void."""
    from rich.table import Table

    from enginesmith_client.perf._quantities import NOTHING

    if run.void:
        yield "VOID: the figures below say nothing about the server"
    yield f"{run.title}: {run.model} version {run.model_version}, requests sent by {run.generator}"
    yield f"measured: {run.window.note or run.ended_because}"
    if run.command:
        yield f"{_COMMAND}{run.command}"
    figures = Table(show_header=False)
    for row in _figure_rows(run.figures, (run.profile.get("price") or {}).get("currency", "")):
        figures.add_row(*row)
    yield figures
    times = Table()
    for heading in ("times", "p50", "p90", "p95", "p99", "p99.9", "max", "mean"):
        times.add_column(heading, justify="left" if heading == "times" else "right")
    for name, values in _distributions(run.figures):
        times.add_row(name, *(_time(value) for value in _shown(values)))
    if times.row_count:
        yield times
    if run.checks:
        checks = Table(title="What the harness found about its own numbers", title_justify="left")
        for heading in ("", "check", "in words"):
            checks.add_column(heading, overflow="fold")
        for check in run.checks:
            checks.add_row(check.severity.upper(), check.rule, check.words)
        yield checks
    if run.slo:
        promises = Table(title="SLO", title_justify="left")
        for heading in ("promise", "limit", "measured", ""):
            promises.add_column(heading, justify="right" if heading in ("limit", "measured") else "left")
        for verdict in run.slo:
            measured = NOTHING if verdict.measured is None else _plain(verdict.measured)
            promises.add_row(verdict.name, f"{verdict.limit:g}", measured, _kept(verdict))
        yield promises


def _reasons(run: Run) -> Iterator[str]:
    """Why nobody should ship on this; nothing of a run that was merely ended early."""
    if run.figures.latency_ms is None:
        yield "nothing was measured: not one request was answered"
    if run.void:
        yield f"void: {', '.join(check.rule for check in run.checks if check.severity == 'void')}"
    for verdict in run.slo:
        if verdict.met is False and verdict.measured is not None:
            yield f"SLO missed: {verdict.name} is {_plain(verdict.measured)}, the limit is {verdict.limit:g}"
        elif verdict.met is None:
            yield f"SLO not judged: {verdict.name} could not be measured"


def _figure_rows(figures: Figures, currency: str) -> Iterator[tuple[str, str, str]]:
    from enginesmith_client.perf._quantities import quantity

    failed = ", ".join(f"{count:,} {kind}" for kind, count in figures.errors.items()) or "none"
    counted = f"{figures.requests:,} in {figures.duration_s:.1f} s, failed: {failed}"
    yield "requests", quantity(figures.requests_per_s, "per_s"), counted
    if figures.offered_per_s is not None:
        yield "offered", quantity(figures.offered_per_s, "per_s"), "requests that were due"
    if figures.rows_per_s != figures.requests_per_s:
        yield "rows", quantity(figures.rows_per_s, "per_s"), ""
    for name, value, mean in (
        ("answer tokens", figures.output_tokens_per_s, figures.mean_output_tokens),
        ("prompt tokens", figures.prompt_tokens_per_s, figures.mean_prompt_tokens),
    ):
        if value is not None:
            yield name, quantity(value, "per_s"), f"{quantity(mean, 'plain')} a request"
    if figures.good_per_s is not None:
        share = f"{quantity(figures.good_percent, 'percent')} of the requests kept the SLO"
        yield "goodput", quantity(figures.good_per_s, "per_s"), share
    yield from _server_rows(figures)
    yield from _usage_rows(figures)
    for name, cost in (
        ("million answer tokens", figures.cost_per_million_output_tokens),
        ("million requests", figures.cost_per_million_requests),
    ):
        if cost is not None:
            yield f"cost per {name}", f"{cost:,.4g} {currency}", ""


def _server_rows(figures: Figures) -> Iterator[tuple[str, str, str]]:
    from enginesmith_client.perf._quantities import quantity

    server = figures.server
    if server is None:
        return
    parts = [
        f"{name} {quantity(value, 'ms')}"
        for name, value in (
            ("input", server.compute_input_ms),
            ("model", server.compute_infer_ms),
            ("output", server.compute_output_ms),
        )
        if value is not None
    ]
    yield "queue in the server", quantity(server.queue_ms, "ms"), f"then {', '.join(parts)}" if parts else ""
    if server.mean_batch is not None:
        sizes = ", ".join(f"{size}: {count:,}" for size, count in sorted(server.batch_sizes.items()))
        yield (
            "mean batch",
            quantity(server.mean_batch, "plain"),
            f"executions by size {sizes}" if sizes else "",
        )
    if server.kv_hit_percent is not None:
        yield "found in the KV cache", quantity(server.kv_hit_percent, "percent"), "of the prompt tokens"
    if server.kv_used_bytes is not None:
        total = quantity(server.kv_total_bytes, "bytes")
        yield "KV cache", quantity(server.kv_used_bytes, "bytes"), f"at most, of {total}"


def _usage_rows(figures: Figures) -> Iterator[tuple[str, str, str]]:
    from enginesmith_client.perf._quantities import quantity

    usage = figures.usage
    if usage is None:
        return
    for name, percent, of in (
        ("CPU of the server", usage.server_cpu_percent, "of one core"),
        ("CPU of this program", usage.client_cpu_percent, "of one core"),
        ("CPU of the machine", usage.machine_cpu_percent, "of all cores"),
    ):
        if percent is not None:
            yield name, quantity(percent, "percent"), of
    if usage.server_rss_bytes is not None:
        yield "memory of the server", quantity(usage.server_rss_bytes, "bytes"), "resident, at most"
    if usage.gpu_percent is not None:
        yield (
            "GPU",
            quantity(usage.gpu_percent, "percent"),
            f"memory {quantity(usage.gpu_memory_bytes, 'bytes')}",
        )


def _distributions(figures: Figures) -> Iterator[tuple[str, Quantiles]]:
    for name, values in (
        ("latency", figures.latency_ms),
        ("to the first token", figures.ttft_ms),
        ("between tokens", figures.itl_ms),
        ("per token (TPOT)", figures.tpot_ms),
        ("sent too late by", figures.send_lag_ms),
    ):
        if values is not None:
            yield name, values


def _shown(values: Quantiles) -> tuple[float | None, ...]:
    return values.p50, values.p90, values.p95, values.p99, values.p999, values.max, values.mean


def _time(value_ms: float | None) -> str:
    from enginesmith_client.perf._quantities import quantity

    return quantity(value_ms, "ms")


def _plain(value: float) -> str:
    """Four digits or more, never with an exponent as long as the number can be read without one."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _kept(verdict: SloVerdict) -> str:
    return "not measured" if verdict.met is None else "kept" if verdict.met else "MISSED"
