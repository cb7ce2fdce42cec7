"""Saved results of every kind, made from synthetic records and written as a real run writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import recorded_runs

from enginesmith_client.perf._figures import Figures, ServerFigures
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
from enginesmith_client.perf._saved_files import write_document
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.compare._live import compare_live
from enginesmith_client.perf.judge._metrics import figures_of, slo_verdicts
from enginesmith_client.perf.many._ladder import Ladder
from enginesmith_client.perf.many._suite import FORMAT as SUITE_FORMAT
from enginesmith_client.perf.many._suite import SUITE_FILE, SuiteEntry, SuiteResult
from enginesmith_client.perf.many._sweep import sweep
from enginesmith_client.perf.observe._samples import Sample, SampleWriter

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


def save(
    directory: Path,
    records: Sequence[Record],
    profile: Mapping[str, Any],
    *,
    server: ServerFigures | None = None,
    with_samples: bool = True,
    **fields: Any,
) -> SavedRun:
    """Write a run with the figures of its records; ``fields`` replace those of ``Run``."""
    with RecordWriter(directory / RECORDS_FILE) as writer:
        for record in records:
            writer.write(record)
    seen = samples() if with_samples else []
    if seen:
        with SampleWriter(directory / SAMPLES_FILE) as sample_writer:
            for sample in seen:
                sample_writer.write(sample)
    of = Profile.model_validate(profile)
    last_ns = max(record.ended_ns for record in records) + 1
    window = Window(min(int(4e9), last_ns // 10), last_ns, True, "3 windows agreed")
    figures = figures_of(records, window, of, seen, closed=of.load.loop == "closed")
    run = Run(
        title="chat-short, 6.0 /s",
        model="smollm2-135m-int4-awq",
        model_version="1",
        url="grpc://127.0.0.1:8001",
        profile=of.as_json(),
        profile_digest="3f" * 32,
        started="2026-11-23T08:00:00+00:00",
        generator="enginesmith",
        status="complete",
        ended_because="steady",
        window=window,
        figures=replace(figures, server=server),
        checks=(),
        slo=slo_verdicts(figures, of.slo),
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
CLOSED = {"name": "tensors", "load": {"loop": "closed", "concurrency": 16}, "slo": {"p99_latency_ms": 3.0}}


def good_run(directory: Path) -> SavedRun:
    """An open loop against an LLM that kept its SLO."""
    records = llm_records()
    server = ServerFigures(
        requests=len(records), queue_ms=1.2, compute_input_ms=0.02, compute_infer_ms=612.0, compute_output_ms=0.01,
        executions=7168, batch_sizes={1: 310, 2: 822, 3: 1804, 4: 2204, 5: 1210, 6: 602, 8: 216}, mean_batch=3.7,
        kv_hit_percent=41.5, kv_used_bytes=180 << 20, kv_total_bytes=512 << 20,
    )  # fmt: skip
    return save(directory, records, OPEN, server=server)


def troubled_run(directory: Path) -> SavedRun:
    """Ended early, failures that say hostile things, warnings, broken promises."""
    return save(
        directory, llm_records(fail_every=7), OPEN | {"slo": {"p99_latency_ms": 600.0, "itl_ms": 60.0}},
        title=f"chat {HOSTILE}", model=HOSTILE, generator="perf_analyzer", command=f"perf_analyzer -m {HOSTILE}",
        status="partial", ended_because="the server is lost", workload={"kind": HOSTILE, HOSTILE: {"inner": HOSTILE}},
        checks=(Check("errors", "warning", f"14% of the requests failed; the first said: {HOSTILE}"),),
    )  # fmt: skip


def void_run(directory: Path) -> SavedRun:
    """A generator that measured itself."""
    batches = {1: 1400, 2: 1020, 4: 3700}
    words = (
        "the load generator used 98% of a core: it is what was measured, not the server. "
        "Measure with perf_analyzer (load: generator: perf_analyzer) and trust its figure."
    )
    return save(
        directory, tensor_records(6_000, median_ms=0.9), CLOSED, title="echo, 16 at a time", model="echo",
        checks=(Check("client-cpu", "void", words),), workload={"kind": "tensors"},
        server=ServerFigures(20_000, 0.08, 0.01, 0.11, 0.01, 6120, batch_sizes=batches, mean_batch=3.2),
    )  # fmt: skip


def empty_run(directory: Path) -> SavedRun:
    """Not one answer."""
    check = Check(
        "zero-answered", "void", "not one request was answered; the first failed with: connection refused"
    )
    records = [Record(0, 0, 0, 10_000_000, "connect", "refused")]
    return save(directory, records, CLOSED, checks=(check,), with_samples=False)


def short_run(directory: Path) -> SavedRun:
    """A handful of answers, all of them alike: nothing to spread an axis over. No first tokens, which the SLO is about."""
    records = [
        Record(number, number * 10**9, number * 10**9, number * 10**9 + 5_000_000) for number in range(4)
    ]
    promised = CLOSED | {"slo": {"ttft_ms": 3}}
    return save(directory, records, promised, with_samples=False)


def a_sweep(directory: Path) -> None:
    """Seven loads of a server that does 100 requests at a time well; the SLO breaks at the sixth; one point is void."""

    def figures(_: Target, profile: Profile) -> Figures:
        load = recorded_runs.load_of(profile)
        per_s = 400 * load / (load + 8)
        p50_ms = 1000 * load / per_s
        made = recorded_runs.figures(p50_ms=p50_ms, requests_per_s=per_s, count=2000)
        return replace(made, good_per_s=per_s if p50_ms < 90 else per_s / 3)

    def fields(_: Target, profile: Profile) -> Mapping[str, Any]:
        load = recorded_runs.load_of(profile)
        measured = 1.6 * (1000 / 400) * (load + 8)
        void = (recorded_runs.void_check(f"the clock jumped {HOSTILE}"),) if load == 2 else ()
        return {"slo": (SloVerdict("p99_latency_ms", 150.0, measured, measured <= 150.0),), "checks": void}

    profile = Profile.model_validate(CLOSED | {"slo": {"p99_latency_ms": 150.0}})
    runs = recorded_runs.RecordedRuns(figures, fields)
    sweep(
        Target("m"),
        profile,
        Ladder("concurrency", (1, 2, 4, 8, 16, 32, 64, 128)),
        directory=directory,
        run=runs,
    )


def a_comparison(directory: Path, *, slower: float = 1.05, void: bool = False) -> None:
    """Eight rounds in which B takes ``slower`` times as long."""
    rng = np.random.default_rng(5)

    def run(target: Target, profile: Profile, *, directory: Path, **_: Any) -> SavedRun:
        factor = (slower if target.model == "b" else 1.0) * float(rng.normal(1.0, 0.008))
        checks = (recorded_runs.void_check(f"the clock jumped {HOSTILE}"),) if void else ()
        records = tensor_records(int(600 / factor), seconds=5.0, median_ms=6.0 * factor)
        return save(
            directory, records, profile.as_json(), model=target.model, with_samples=False, checks=checks,
            workload={"kind": "tensors"},
        )  # fmt: skip

    profile = Profile.model_validate(CLOSED)
    compare_live(Target("a"), Target("b"), profile, rounds=8, directory=directory, run=run)


def a_suite(directory: Path) -> None:
    """Scenarios of every fate: kept, broken with failures, void, skipped."""
    good_run(directory / "chat-short")
    troubled_run(directory / "bursty")
    void_run(directory / "many-tiny")
    entries = (
        SuiteEntry("chat-short", "Short chats", "What most users do.", "measured", "chat-short"),
        SuiteEntry("bursty", "Bursts", HOSTILE, "measured", "bursty", notes=("cut to 512 tokens",)),
        SuiteEntry("many-tiny", "Many tiny requests", "", "measured", "many-tiny"),
        SuiteEntry("embeddings-bulk", "Bulk", "", "skipped", reason=f"it is for models that {HOSTILE}"),
        SuiteEntry("soak", "Soak", "", "failed", reason="the server refused the profile"),
    )
    result = SuiteResult(
        "standard",
        "m",
        "1",
        "grpc://127.0.0.1:8001",
        "text",
        "complete",
        "2026-11-23T08:00:00+00:00",
        entries,
    )
    write_document(directory / SUITE_FILE, SUITE_FORMAT, asdict(result))
