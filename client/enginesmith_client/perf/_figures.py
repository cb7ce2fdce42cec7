"""The figures of a run, as values. ``judge._metrics`` computes them; reports, sweeps and comparisons read them.

Times in milliseconds. None means that it was not measured, or that there were too few samples to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quantiles:
    """A distribution of times."""

    count: int
    mean: float
    p50: float
    p90: float | None
    p95: float | None
    p99: float | None
    p999: float | None
    """A quantile q is None for fewer than 1 / (1 - q) samples."""
    max: float


@dataclass(frozen=True)
class ServerFigures:
    """What the server says that it did within the window, from its statistics before and after."""

    requests: int
    queue_ms: float | None
    """Mean over requests, as the next three."""
    compute_input_ms: float | None
    compute_infer_ms: float | None
    compute_output_ms: float | None
    executions: int
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    """Executions by the batch size that was formed. Empty for models that batch in flight and tell only through metrics."""
    mean_batch: float | None = None
    kv_hit_percent: float | None = None
    """Prompt tokens that were found in the KV cache, of all prompt tokens."""
    kv_used_bytes: int | None = None
    """The most that was seen."""
    kv_total_bytes: int | None = None
    kv_used_percent: float | None = None
    """The most that was seen, of the bytes or blocks that there are."""


@dataclass(frozen=True)
class UsageFigures:
    """What the machine was busy with. Percents of CPU are of one core: 200 is two cores."""

    client_cpu_percent: float | None = None
    server_cpu_percent: float | None = None
    machine_cpu_percent: float | None = None
    """Of all cores together: 100 is all of them."""
    server_rss_bytes: int | None = None
    """The most that was seen, of tritonserver and the processes that it started."""
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True)
class Figures:
    """All of one run."""

    duration_s: float
    """Of the window."""
    requests: int
    """Answered or failed."""
    errors: Mapping[str, int]
    """Failures by kind."""
    requests_per_s: float
    """Answered ones."""
    rows_per_s: float
    offered_per_s: float | None
    """Requests that were due per second; None in a closed loop."""
    latency_ms: Quantiles | None
    """From when a request was due to its last response; of answered requests."""
    ttft_ms: Quantiles | None = None
    itl_ms: Quantiles | None = None
    """Between two consecutive pieces of a stream, over all pieces of all streams."""
    tpot_ms: Quantiles | None = None
    """(end - first token) / (output tokens - 1), a value for each request."""
    tokens_per_s_p1: float | None = None
    """Output tokens of a request over its latency: 99% of requests had at least this."""
    tokens_per_s_min: float | None = None
    """The same of the slowest request."""
    output_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    mean_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None
    good_per_s: float | None = None
    """Goodput: requests per second that kept the SLO. None without an SLO."""
    good_percent: float | None = None
    send_lag_ms: Quantiles | None = None
    """How late requests were sent; None in a closed loop and of perf_analyzer."""
    server: ServerFigures | None = None
    usage: UsageFigures | None = None
    cost_per_million_output_tokens: float | None = None
    cost_per_million_requests: float | None = None
