"""Tables of the figures of one run, and what each figure is, in a line. docs/bench-metrics.md says it at length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from enginesmith_client.perf._figures import Figures, Quantiles, ServerFigures, UsageFigures
from enginesmith_client.perf._quantities import NOTHING, Unit, quantity, significant
from enginesmith_client.perf._run_files import Run, SloVerdict
from enginesmith_client.perf.report._model import Table, Tile

SLO_NAMES: Mapping[str, tuple[str, Unit]] = {
    "p99_latency_ms": ("latency, p99", "ms"),
    "ttft_ms": ("time to first token, p99", "ms"),
    "itl_ms": ("time per output token, p99", "ms"),
    "min_tokens_per_s": ("output tokens per second that 99% of requests had", "per_s"),
    "max_error_percent": ("failed requests", "percent"),
}
"""Keys of the profile's SLO: in words, and their unit."""

DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "latency",
        "From when a request was due to its last response. In a closed loop it is due when it is sent.",
    ),
    ("time to first token (TTFT)", "From when a request was due to the first response with something in it."),
    ("inter-token latency (ITL)", "Between two consecutive responses of a stream, over all streams."),
    (
        "time per output token (TPOT)",
        "(end − first token) / (output tokens − 1), one value for each request.",
    ),
    (
        "p50, p90, …",
        "A value that was measured: the one of that rank. None where too few were measured to have one beyond it.",
    ),
    ("throughput", "Answered requests (tokens, rows) that ended within the window, divided by its length."),
    ("offered", "Requests that were due per second: what an open loop asks for."),
    ("goodput", "Answered requests per second that kept every limit of the SLO."),
    ("send lag", "How late the generator sent a request that was due: its own fault, not the server's."),
    ("queue, compute", "Triton's own statistics of the model, mean over the requests of the window."),
    ("batch sizes", "Executions by the number of rows that the server put together."),
    ("KV-cache hits", "Prompt tokens that were found in the KV cache, of all prompt tokens."),
    ("CPU", "CPU time per time: 100% is one core. Of the machine: 100% is all cores."),
    ("server memory", "The most resident memory seen, of tritonserver and the processes that it started."),
)


def slo_row(verdict: SloVerdict) -> tuple[str, str, str, str]:
    """A promise, its limit, what was measured, and whether it was kept."""
    name, unit = SLO_NAMES.get(verdict.name, (verdict.name, "plain"))
    bound = "at least" if verdict.name.startswith("min_") else "at most"
    kept = {True: "kept", False: "broken", None: "not known"}[verdict.met]
    return name, f"{bound} {quantity(verdict.limit, unit)}", quantity(verdict.measured, unit), kept


def tiles_of(run: Run) -> tuple[Tile, ...]:
    """The few figures that a reader looks for first."""
    figures = run.figures
    tiles = [Tile("Throughput", quantity(figures.requests_per_s, "per_s"), "requests")]
    if figures.output_tokens_per_s is not None:
        tiles.append(Tile("Output tokens", quantity(figures.output_tokens_per_s, "per_s")))
    for name, times in (
        ("Latency", figures.latency_ms),
        ("TTFT", figures.ttft_ms),
        ("TPOT", figures.tpot_ms),
    ):
        if times is not None:
            note = f"p99 {quantity(times.p99, 'ms')}" if times.p99 is not None else "too few for a p99"
            tiles.append(Tile(f"{name}, p50", quantity(times.p50, "ms"), note))
    if figures.good_per_s is not None:
        note = (
            f"{quantity(figures.good_percent, 'percent')} of requests"
            if figures.good_percent is not None
            else ""
        )
        tiles.append(Tile("Goodput", quantity(figures.good_per_s, "per_s"), note))
    failed = sum(figures.errors.values())
    share = f"{quantity(100 * failed / figures.requests, 'percent')} of requests" if figures.requests else ""
    tiles.append(Tile("Failed", f"{failed:,}", share))
    return tuple(tiles)


def figure_tables(run: Run) -> tuple[Table, ...]:
    """Everything that was measured."""
    figures = run.figures
    tables = [_times(figures), _amounts(figures, run.profile)]
    if figures.errors:
        rows = tuple((kind, f"{count:,}") for kind, count in sorted(figures.errors.items()))
        tables.append(Table("Failures by kind", ("kind", "requests"), rows))
    if figures.server is not None:
        tables.append(_server(figures.server))
    if figures.usage is not None:
        tables.append(_usage(figures.usage))
    return tuple(table for table in tables if table.rows)


def _times(figures: Figures) -> Table:
    named = (
        ("latency", figures.latency_ms),
        ("time to first token", figures.ttft_ms),
        ("inter-token latency", figures.itl_ms),
        ("time per output token", figures.tpot_ms),
        ("send lag", figures.send_lag_ms),
    )
    columns = ("", "mean", "p50", "p90", "p95", "p99", "p99.9", "max", "values")
    rows = tuple((name, *_quantiles(times)) for name, times in named if times is not None)
    return Table("Times", columns, rows)


def _quantiles(times: Quantiles) -> Iterable[str]:
    for value in (times.mean, times.p50, times.p90, times.p95, times.p99, times.p999, times.max):
        yield quantity(value, "ms")
    yield f"{times.count:,}"


def _amounts(figures: Figures, profile: Mapping[str, Any]) -> Table:
    currency = (profile.get("price") or {}).get("currency", "")
    named: tuple[tuple[str, float | None, Unit], ...] = (
        ("measured for", figures.duration_s, "s"),
        ("requests, answered or failed", figures.requests, "count"),
        ("requests answered", figures.requests_per_s, "per_s"),
        ("requests offered", figures.offered_per_s, "per_s"),
        (
            "rows answered",
            figures.rows_per_s if figures.rows_per_s != figures.requests_per_s else None,
            "per_s",
        ),
        ("goodput", figures.good_per_s, "per_s"),
        ("requests that kept the SLO", figures.good_percent, "percent"),
        ("output tokens", figures.output_tokens_per_s, "per_s"),
        ("prompt tokens", figures.prompt_tokens_per_s, "per_s"),
        ("output tokens of a request, mean", figures.mean_output_tokens, "plain"),
        ("output tokens per second of a request, p1", figures.tokens_per_s_p1, "per_s"),
        ("output tokens per second of the slowest request", figures.tokens_per_s_min, "per_s"),
        ("prompt tokens of a request, mean", figures.mean_prompt_tokens, "plain"),
    )
    rows = [(name, quantity(value, unit)) for name, value, unit in named if value is not None]
    for name, cost in (
        ("cost of a million output tokens", figures.cost_per_million_output_tokens),
        ("cost of a million requests", figures.cost_per_million_requests),
    ):
        if cost is not None:
            rows.append((name, f"{significant(cost)} {currency}"))
    return Table("Throughput and amounts", ("", "value"), tuple(rows))


def _server(server: ServerFigures) -> Table:
    named: tuple[tuple[str, float | None, Unit], ...] = (
        ("requests that the server counted", server.requests, "count"),
        ("in the queue, mean", server.queue_ms, "ms"),
        ("compute: input, mean", server.compute_input_ms, "ms"),
        ("compute: inference, mean", server.compute_infer_ms, "ms"),
        ("compute: output, mean", server.compute_output_ms, "ms"),
        ("executions", server.executions, "count"),
        ("batch size, mean", server.mean_batch, "plain"),
        ("prompt tokens from the KV cache", server.kv_hit_percent, "percent"),
        ("KV cache used, at most", server.kv_used_bytes, "bytes"),
        ("KV cache used, at most, of all", server.kv_used_percent, "percent"),
        ("KV cache in all", server.kv_total_bytes, "bytes"),
    )
    rows = tuple((name, quantity(value, unit)) for name, value, unit in named if value is not None)
    return Table("What the server says", ("", "value"), rows)


def _usage(usage: UsageFigures) -> Table:
    named: tuple[tuple[str, float | None, Unit], ...] = (
        ("CPU of the server", usage.server_cpu_percent, "percent"),
        ("CPU of the load generator", usage.client_cpu_percent, "percent"),
        ("CPU of the machine", usage.machine_cpu_percent, "percent"),
        ("memory of the server, at most", usage.server_rss_bytes, "bytes"),
        ("GPU", usage.gpu_percent, "percent"),
        ("GPU memory", usage.gpu_memory_bytes, "bytes"),
    )
    rows = tuple((name, quantity(value, unit)) for name, value, unit in named if value is not None)
    return Table("What the machine was busy with", ("", "value"), rows)


def short_row(run: Run) -> tuple[str, ...]:
    """A run as a row of a table of runs; ``SHORT_COLUMNS`` are its columns."""
    figures = run.figures
    latency, ttft = figures.latency_ms, figures.ttft_ms
    kept = {True: "kept", False: "broken", None: NOTHING}[run.slo_met]
    return (
        quantity(figures.requests_per_s, "per_s"),
        quantity(figures.output_tokens_per_s, "per_s"),
        quantity(latency.p50 if latency else None, "ms"),
        quantity(latency.p99 if latency else None, "ms"),
        quantity(ttft.p50 if ttft else None, "ms"),
        quantity(figures.good_per_s, "per_s"),
        f"{sum(figures.errors.values()):,}",
        kept,
    )


SHORT_COLUMNS = ("requests", "tokens", "p50", "p99", "TTFT p50", "goodput", "failed", "SLO")
