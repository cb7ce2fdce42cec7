"""Saved results of every kind, made from synthetic records and written as a real run writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from enginesmith_client.perf._figures import Figures, Quantiles, ServerFigures, UsageFigures
from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._records import Record, RecordWriter
from enginesmith_client.perf._run_files import (
    RECORDS_FILE,
    SAMPLES_FILE,
    Check,
    Run,
    SavedRun,
    SloVerdict,
    Window,
    save_run,
)
from enginesmith_client.perf._samples import Sample, SampleWriter

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=alert(1)> | `a` [b](http://x.invalid) \"'&"
)
"""What a server could name a model, or say of a failure."""

MACHINE = {
    "cpu": "Example CPU at 2.4 GHz",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "system": "Linux 6.1",
    "gpus": [],
}
VERSIONS = {"enginesmith-client": "0.1.0", "python": "3.11.9", "tritonclient": "2.73.0", "numpy": "1.26.4"}


def llm_records(*, seconds: float = 40.0, rate_per_s: float = 6.0, fail_every: int = 0) -> list[Record]:
    """Streams of an open loop: due at random times, a slow first token, then steady ones."""
    rng = np.random.default_rng(1)
    due_s = np.cumsum(rng.exponential(1 / rate_per_s, int(seconds * rate_per_s)))
    records = []
    for number, due in enumerate(due_s):
        first = 0.08 + rng.gamma(2.0, 0.03)
        gaps = rng.gamma(9.0, 0.0016, 31) + (rng.random(31) < 0.03) * 0.06
        pieces = due + first + np.concatenate([[0.0], np.cumsum(gaps)])
        failed = fail_every and number % fail_every == 0
        records.append(
            Record(
                number,
                int(due * 1e9),
                int((due + rng.exponential(0.0003)) * 1e9),
                int((due + 5.0 if failed else pieces[-1] + 0.002) * 1e9),
                outcome="overloaded" if failed else "ok",
                error=f"queue full {HOSTILE}" if failed else "",
                prompt_tokens=64,
                output_tokens=None if failed else 32,
                piece_ns=() if failed else tuple(int(at * 1e9) for at in pieces),
            )
        )
    return records


def tensor_records(count: int, *, seconds: float = 30.0, median_ms: float = 5.0) -> list[Record]:
    """Plain answers, evenly over ``seconds``, with a log-normal latency."""
    rng = np.random.default_rng(2)
    sent = np.sort(rng.uniform(0, seconds, count))
    ended = sent + rng.lognormal(np.log(median_ms / 1e3), 0.35, count)
    return [
        Record(number, int(start * 1e9), int(start * 1e9), int(end * 1e9))
        for number, (start, end) in enumerate(zip(sent, ended, strict=True))
    ]


def samples(*, seconds: int = 42, cores: float = 1.6) -> list[Sample]:
    """A busy server that grows a little."""
    rng = np.random.default_rng(3)
    busy = np.cumsum(rng.uniform(cores * 0.8, cores * 1.05, seconds))
    return [
        Sample(
            at_ns=int(second * 1e9),
            wall_ahead_s=0.0,
            client_cpu_s=0.11 * second,
            server_cpu_s=float(busy[second]),
            server_rss_bytes=(900 << 20) + second * (2 << 20),
        )
        for second in range(seconds)
    ]


def quantiles(values_ms: Sequence[float]) -> Quantiles | None:
    """Nearest rank."""
    if not len(values_ms):
        return None
    ordered = np.sort(np.asarray(values_ms, dtype=float))

    def at(share: float) -> float:
        return float(ordered[int(np.ceil(share * ordered.size)) - 1])

    return Quantiles(
        count=ordered.size,
        mean=float(ordered.mean()),
        p50=at(0.5),
        p90=at(0.9),
        p95=at(0.95),
        p99=at(0.99) if ordered.size >= 100 else None,
        p999=at(0.999) if ordered.size >= 1000 else None,
        max=float(ordered[-1]),
    )


def figures_of(records: Sequence[Record], seconds: float, **others: Any) -> Figures:
    """Enough of them for a report; the real ones are tested elsewhere."""
    answered = [record for record in records if record.ok]
    streams = [record for record in answered if len(record.piece_ns) > 1]
    tokens = sum(record.output_tokens or 0 for record in answered)
    streamed: dict[str, Any] = {}
    if streams:
        streamed = {
            "ttft_ms": quantiles([(record.piece_ns[0] - record.due_ns) / 1e6 for record in streams]),
            "itl_ms": quantiles(list(np.concatenate([np.diff(record.piece_ns) for record in streams]) / 1e6)),
            "tpot_ms": quantiles([(one.piece_ns[-1] - one.piece_ns[0]) / 31e6 for one in streams]),
            "output_tokens_per_s": tokens / seconds,
        }
    figures = Figures(
        duration_s=seconds,
        requests=len(records),
        errors=dict(Counter(record.outcome for record in records if not record.ok)),
        requests_per_s=len(answered) / seconds,
        rows_per_s=len(answered) / seconds,
        offered_per_s=None,
        latency_ms=quantiles([record.latency_ns / 1e6 for record in answered]),
        usage=UsageFigures(
            client_cpu_percent=11.0,
            server_cpu_percent=151.2,
            machine_cpu_percent=82.0,
            server_rss_bytes=986 << 20,
        ),
        **streamed,
    )
    return replace(figures, **others)


def save(
    directory: Path,
    records: Sequence[Record],
    profile: Mapping[str, Any],
    *,
    figures: Figures,
    window: Window | None = None,
    with_samples: bool = True,
    **fields: Any,
) -> SavedRun:
    """Write a run; ``fields`` replace those of ``Run``."""
    with RecordWriter(directory / RECORDS_FILE) as writer:
        for record in records:
            writer.write(record)
    if with_samples:
        with SampleWriter(directory / SAMPLES_FILE) as sample_writer:
            for sample in samples():
                sample_writer.write(sample)
    default = Window(
        int(4e9),
        max(record.ended_ns for record in records) if records else int(30e9),
        True,
        "3 windows agreed",
    )
    run = Run(
        title="chat-short, 6.0 /s",
        model="smollm2-135m-int4-awq",
        model_version="1",
        url="grpc://127.0.0.1:8001",
        profile=Profile.model_validate(profile).as_json(),
        profile_digest="3f" * 32,
        started="2026-11-23T08:00:00+00:00",
        generator="enginesmith",
        status="complete",
        ended_because="steady",
        window=window or default,
        figures=figures,
        checks=(),
        slo=(),
        machine=MACHINE,
        versions=VERSIONS,
        workload={"kind": "text", "tokens_per_word": 1.31, "different": 64},
        server={"name": "triton", "version": "2.51.0"},
    )
    return save_run(directory, replace(run, **fields))


OPEN = {
    "name": "chat-short",
    "requests": {
        "prompt_tokens": {"kind": "lognormal", "median": 64, "sigma": 0.5},
        "output_tokens": {"kind": "fixed", "tokens": 32},
    },
    "load": {"loop": "open", "rate_per_s": 6.0},
    "slo": {"p99_latency_ms": 1200.0, "ttft_ms": 400.0, "itl_ms": 60.0},
    "price": {"per_hour": 0.42},
}


def good_run(directory: Path) -> SavedRun:
    """An open loop against an LLM that kept its SLO."""
    records = llm_records()
    server = ServerFigures(
        requests=len(records), queue_ms=1.2, compute_input_ms=0.02, compute_infer_ms=612.0, compute_output_ms=0.01,
        executions=7168, batch_sizes={1: 310, 2: 822, 3: 1804, 4: 2204, 5: 1210, 6: 602, 8: 216}, mean_batch=3.7,
        kv_hit_percent=41.5, kv_used_bytes=180 << 20, kv_total_bytes=512 << 20,
    )  # fmt: skip
    figures = figures_of(
        records, 40.0, offered_per_s=6.0, good_per_s=5.9, good_percent=98.3, server=server,
        send_lag_ms=quantiles([record.lag_ns / 1e6 for record in records]), cost_per_million_output_tokens=0.61,
    )  # fmt: skip
    slo = (
        SloVerdict("p99_latency_ms", 1200.0, figures.latency_ms.p99 if figures.latency_ms else None, True),
        SloVerdict("ttft_ms", 400.0, 300.2, True),
        SloVerdict("max_error_percent", 0.0, 0.0, True),
    )
    return save(directory, records, OPEN, figures=figures, slo=slo)


def troubled_run(directory: Path) -> SavedRun:
    """Ended early, failures that say hostile things, warnings, a broken promise."""
    records = llm_records(fail_every=7)
    figures = figures_of(records, 40.0, offered_per_s=6.0, good_per_s=4.4, good_percent=73.1)
    return save(
        directory, records, OPEN, figures=figures, status="partial", ended_because="the server is lost",
        title=f"chat {HOSTILE}", model=HOSTILE, generator="perf_analyzer", command=f"perf_analyzer -m {HOSTILE}",
        checks=(Check("errors", "warning", f"14% of the requests failed; the first said: {HOSTILE}"),),
        slo=(
            SloVerdict("p99_latency_ms", 600.0, 912.0, False),
            SloVerdict("min_tokens_per_s", 20.0, None, None),
            SloVerdict("max_error_percent", 0.0, 14.3, False),
        ),
        workload={"kind": HOSTILE, HOSTILE: {"inner": HOSTILE}},
    )  # fmt: skip


def void_run(directory: Path) -> SavedRun:
    """A generator that measured itself."""
    records = tensor_records(20_000, median_ms=0.9)
    server = ServerFigures(
        20_000, 0.08, 0.01, 0.11, 0.01, 6120, batch_sizes={1: 1400, 2: 1020, 4: 3700}, mean_batch=3.2
    )
    check = Check(
        "client-cpu",
        "void",
        "the load generator used 98% of a core: it is what was measured, not the server. "
        "Measure with perf_analyzer (load: generator: perf_analyzer) and trust its figure.",
    )
    return save(
        directory, records, {"load": {"concurrency": 16}, "slo": {"p99_latency_ms": 3}}, title="echo, 16 at a time",
        model="echo", figures=figures_of(records, 30.0, server=server), checks=(check,),
        slo=(SloVerdict("p99_latency_ms", 3.0, 2.1, True),), workload={"kind": "tensors"},
    )  # fmt: skip


def empty_run(directory: Path) -> SavedRun:
    """Not one answer."""
    check = Check(
        "zero-answered", "void", "not one request was answered; the first failed with: connection refused"
    )
    records = [Record(0, 0, 0, 10_000_000, "connect", "refused")]
    figures = Figures(30.0, 1, {"connect": 1}, 0.0, 0.0, None, None)
    return save(
        directory, records, {"load": {"concurrency": 1}}, figures=figures, checks=(check,), with_samples=False
    )
