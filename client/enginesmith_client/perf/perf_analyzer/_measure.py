"""Measures with NVIDIA's perf_analyzer, the generator that others compare with.

It sends the very tensors that our own generator sends, in a process group of its own, and its export of time stamps becomes
records like ours, so that one set of formulas gives both figures; what its own report says is kept beside them. What it
cannot do is said here and in docs/bench-perf-analyzer.md: its windows are always judged three at a time, it has no warm-up
of a given length, it ends at the first request that fails, and its clock is the wall clock.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from enginesmith_client._address import address_from_url
from enginesmith_client._client import Client
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import ClosedLoad, Profile
from enginesmith_client.perf._progress import OnProgress, Progress, ignore_progress
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf._saved_files import appearing, writing
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import TokenCounts
from enginesmith_client.perf.perf_analyzer._failures import JUDGED_WINDOWS, STEADIER, disagreement, failure_of
from enginesmith_client.perf.perf_analyzer._files import (
    Export,
    InputData,
    batch_size,
    input_data_from_requests,
    input_data_from_rows,
    read_export,
    read_report,
    records_of,
)
from enginesmith_client.perf.perf_analyzer._process import Ended, Limits, Pass, run_watched
from enginesmith_client.perf.perf_analyzer._tool import (
    PerfAnalyzer,
    find_perf_analyzer,
    is_untried,
    supported_versions,
)

if TYPE_CHECKING:
    from enginesmith_client.perf.workload._payload import Workload

__all__ = [
    "PerfAnalyzer",
    "PerfAnalyzerRun",
    "Question",
    "find_perf_analyzer",
    "input_data_from_rows",
    "measure_with_perf_analyzer",
    "run_perf_analyzer",
]

_WINDOW_PER_INTERVAL = 1.2
"""How much longer a window is than ``--measurement-interval``: ``InferenceProfiler::Measure``, and seen."""
_SPARE_S = 10.0
"""How late an interrupt may come on a busy machine before perf_analyzer runs out of windows."""
_COUNTED_GRACE_S = 1.0
_CONFIG_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Question:
    """What perf_analyzer is asked to measure."""

    model: str
    address: str
    """``host:port`` of the gRPC endpoint."""
    data: InputData
    concurrency: int
    version: str = ""
    encrypted: bool = False
    batch: int = 1
    """Rows of one request, taken from consecutive entries of ``data``."""
    streaming: bool = False
    counts: TokenCounts = field(default_factory=TokenCounts)
    headers: Mapping[str, str] = field(default_factory=dict)
    window_s: float = 5.0
    stability_percent: float = 10.0
    max_s: float = 60.0
    request_count: int | None = None
    """Exactly so many requests, in place of windows that agree."""
    timeout_s: float = 60.0
    """How long the last requests may take after the end is asked for."""
    title: str = ""


@dataclass(frozen=True)
class PerfAnalyzerRun:
    """What perf_analyzer measured. Times are nanoseconds of the monotonic clock since ``origin_ns``."""

    records: tuple[Record, ...]
    """Of all its windows. Requests that it had not finished at its end are not among them."""
    window: Window
    """Those of its windows that it counted; with a request count, from the first request to the last response."""
    status: Literal["complete", "partial"]
    ended_because: str
    command: str
    """As a shell takes it. Values of headers are left out."""
    version: str
    said: Mapping[str, float]
    """Its own figures: ``rows_per_s``, ``avg_ms``, ``p50_ms`` ... ``p99_ms``, ``queue_ms``, ``compute_infer_ms`` and so on.
    Empty where it did not come to report any. With a request count its throughput is over whole seconds, rounded up."""
    origin_ns: int
    """On the monotonic clock of this machine; known through the wall clock, so to about a microsecond."""
    wall_vs_monotonic_s: float
    """How far the wall clock, which perf_analyzer measures with, moved against the monotonic one."""

    @property
    def rows_per_s(self) -> float:
        """Rows of the answers within the window per second, from the records."""
        inside = [
            one.rows for one in self.records if self.window.start_ns <= one.ended_ns < self.window.end_ns
        ]
        return sum(inside) / (self.window.end_ns - self.window.start_ns) * 1e9


def measure_with_perf_analyzer(
    target: Target,
    workload: Workload,
    profile: Profile,
    *,
    directory: Path,
    on_progress: OnProgress = ignore_progress,
    origin_ns: int | None = None,
) -> PerfAnalyzerRun:
    """Measure the closed loop of ``profile`` with perf_analyzer; its files stay in ``directory``.

    ``origin_ns``: what times are counted from, on the monotonic clock; default: the first request.

    Raises:
        ProfileError: the profile asks for what perf_analyzer cannot do.
        ToolError: there is no perf_analyzer, or it did not finish.
        MeasurementError: requests failed, at the first of which it ends.
        ConnectError: the server is not there, or not any more.
        ModelNotReady: it does not serve the model.
    """
    load, measure = profile.load, profile.measure
    if not isinstance(load, ClosedLoad):
        raise ProfileError(
            "perf_analyzer measures closed loops only", hint="leave out generator, or set loop: closed"
        )
    if measure.max_requests is not None and measure.max_requests < load.concurrency:
        raise ProfileError(
            f"max_requests {measure.max_requests} is less than concurrency {load.concurrency}, which perf_analyzer refuses",
            hint="raise measure.max_requests, or measure with generator: enginesmith",
        )
    with Client(target.url, timeout_s=_CONFIG_TIMEOUT_S) as client:
        batched = client.metadata(target.model, version=target.version).max_batch_size > 0
    address = address_from_url(target.url)
    question = Question(
        model=target.model,
        address=address.authority,
        data=input_data_from_requests(workload.requests, batched=batched),
        concurrency=load.concurrency,
        version=target.version,
        encrypted=address.encrypted,
        batch=batch_size(workload.requests) if batched else 1,
        # Whole answers of a decoupled model come over a stream, too.
        streaming=any(request.streaming for request in workload.requests),
        counts=workload.counts,
        headers=profile.requests.headers,
        window_s=measure.window_s,
        stability_percent=measure.stability_percent,
        max_s=measure.max_s,
        request_count=measure.max_requests,
        timeout_s=max(measure.timeout_s, measure.drain_s),
        title=f"{profile.name}, {load.concurrency} at a time, by perf_analyzer",
    )
    return run_perf_analyzer(question, directory=directory, on_progress=on_progress, origin_ns=origin_ns)


def run_perf_analyzer(
    question: Question,
    *,
    directory: Path,
    tool: PerfAnalyzer | None = None,
    on_progress: OnProgress = ignore_progress,
    origin_ns: int | None = None,
) -> PerfAnalyzerRun:
    """Ask perf_analyzer. Errors and files as for ``measure_with_perf_analyzer``."""
    tool = tool or find_perf_analyzer()
    version = tool.version()
    files = _Files(directory)
    command = _command(question, tool.executable, files)
    shown = _shown(command)
    files.prepare(question.data, shown)
    wall_offset_ns = time.time_ns() - time.monotonic_ns()
    ended = run_watched(
        command,
        environment=tool.environment(),
        log=files.log,
        limits=Limits(
            passes=None if question.request_count else _trials(question),
            seconds=_longest_s(question),
            # With a request count an interrupt makes it wait for ever.
            grace_s=_COUNTED_GRACE_S if question.request_count else question.timeout_s,
        ),
        on_step=lambda elapsed_s, passes: on_progress(_progress(question, elapsed_s, passes)),
    )
    moved_s = (time.time_ns() - time.monotonic_ns() - wall_offset_ns) / 1e9
    export, said = read_export(files.export, question.counts), read_report(files.report)
    nothing_in_windows = bool(ended.passes) and all(one.error for one in ended.passes)
    if export is None or nothing_in_windows:
        raise failure_of(
            ended,
            model=question.model,
            address=question.address,
            log=files.log,
            window_s=question.window_s,
            stability_percent=question.stability_percent,
        )
    if origin_ns is None:
        origin_ns = export.requests[0].sent_ns - wall_offset_ns
    records = records_of(
        export,
        origin_unix_ns=origin_ns + wall_offset_ns,
        rows=question.batch,
        streaming=question.streaming,
        pieces_are_tokens=question.counts.pieces_are_tokens,
    )
    on_progress(_done(question, records))
    untried = (
        f"; perf_analyzer {version} is untried here ({supported_versions()} are)"
        if is_untried(version)
        else ""
    )
    return PerfAnalyzerRun(
        records=tuple(records),
        window=_window(question, ended, export, records, reported=said is not None, note=untried),
        status="partial" if said is None and ended.because != "max_s" else "complete",
        ended_because=_because(question, ended, reported=said is not None),
        command=shown,
        version=version,
        said=said or {},
        origin_ns=origin_ns,
        wall_vs_monotonic_s=moved_s,
    )


def _because(question: Question, ended: Ended, *, reported: bool) -> str:
    """It may have become stable in the very moment in which it was told to end."""
    if reported:
        return "max_requests" if question.request_count else "steady"
    return ended.because or "max_s"


@dataclass(frozen=True)
class _Files:
    """Where everything is kept."""

    directory: Path

    @property
    def inputs(self) -> Path:
        return self.directory / "perf_analyzer.inputs.json"

    @property
    def report(self) -> Path:
        return self.directory / "perf_analyzer.csv"

    @property
    def export(self) -> Path:
        return self.directory / "perf_analyzer.export.json"

    @property
    def log(self) -> Path:
        return self.directory / "perf_analyzer.log"

    def prepare(self, data: InputData, command: str) -> None:
        """Write the input and begin the log, and remove what an earlier run left."""
        with appearing(self.inputs) as staging:
            staging.write_text(json.dumps(data), encoding="utf-8")
        with writing(self.log):
            self.log.write_text(f"{command}\n", encoding="utf-8")
            for stale in (self.report, self.export):
                stale.unlink(missing_ok=True)


def _command(question: Question, executable: Path, files: _Files) -> list[str]:
    command = [str(executable), "-m", question.model, "-u", question.address, "-i", "grpc", "-v"]
    command += ["-x", question.version] if question.version else []
    command += ["--ssl-grpc-use-ssl", "true"] if question.encrypted else []
    command += [part for name, value in question.headers.items() for part in ("-H", f"{name}:{value}")]
    command += ["--input-data", str(files.inputs), "-b", str(question.batch)]
    command += ["--concurrency-range", str(question.concurrency)]
    command += ["--streaming"] if question.streaming else []
    command += ["-f", str(files.report), "--verbose-csv", "--profile-export-file", str(files.export)]
    if question.request_count is not None:
        return [*command, "--request-count", str(question.request_count)]
    interval_ms = max(1, round(question.window_s * 1000 / _WINDOW_PER_INTERVAL))
    # More than are waited for: at its own last one perf_analyzer would end without exporting anything.
    spare = math.ceil(_SPARE_S / question.window_s)
    command += ["--measurement-interval", str(interval_ms), "--max-trials", str(_trials(question) + spare)]
    return [*command, "--stability-percentage", f"{question.stability_percent:g}"]


def _shown(command: Sequence[str]) -> str:
    """The command line as a shell takes it, without the values of headers: they may be secrets."""
    parts = [
        part.partition(":")[0] + ":..." if before == "-H" else part
        for before, part in zip(["", *command], command, strict=False)
    ]
    return shlex.join(parts)


def _trials(question: Question) -> int:
    """Windows that fit into the time; not fewer than perf_analyzer compares."""
    return max(JUDGED_WINDOWS, math.floor(question.max_s / question.window_s))


def _longest_s(question: Question) -> float:
    """Of the whole process: its windows, or the time for a number of requests, and some for its start and its files."""
    planned_s = question.max_s if question.request_count else (_trials(question) + 1) * question.window_s
    return planned_s + question.timeout_s


def _progress(question: Question, elapsed_s: float, passes: Sequence[Pass]) -> Progress:
    measured = [one for one in passes if not one.error]
    rows_per_s = measured[-1].rows_per_s if measured else None
    return Progress(
        phase="measuring",
        title=question.title,
        elapsed_s=elapsed_s,
        planned_s=question.max_s,
        answered=round(sum(one.rows_per_s for one in measured) * question.window_s / question.batch),
        failed=0,
        in_flight=question.concurrency,
        requests_per_s=None if rows_per_s is None else rows_per_s / question.batch,
    )


def _done(question: Question, records: Sequence[Record]) -> Progress:
    answered = sum(record.ok for record in records)
    return Progress(
        phase="done",
        title=question.title,
        elapsed_s=0.0,
        planned_s=None,
        answered=answered,
        failed=len(records) - answered,
        in_flight=0,
    )


def _window(
    question: Question, ended: Ended, export: Export, records: Sequence[Record], *, reported: bool, note: str
) -> Window:
    """What perf_analyzer counted, on the clock of ``records``."""
    shift_ns = records[0].sent_ns - export.requests[0].sent_ns
    if question.request_count is not None:
        # Its own window is rounded up to whole seconds: 200 requests in 0.16 s are 200/s to it. This one ends just
        # after the last response, because the end of a window is outside of it.
        start_ns, end_ns = records[0].sent_ns, max(record.ended_ns for record in records) + 1
        return Window(
            start_ns, end_ns, steady=True, note=f"{len(records)} requests, as many as asked for{note}"
        )
    edges = export.boundaries_ns
    if reported:
        used = edges[-JUDGED_WINDOWS - 1 :]
        words = f"the last {len(used) - 1} of {len(edges) - 1} windows agree within {question.stability_percent:g}%"
        return Window(used[0] + shift_ns, used[-1] + shift_ns, steady=True, note=words + note)
    # The window in which it was told to end is cut off by that; it counts only if there is no other.
    used = edges[: max(2, len(ended.whole_passes) + 1)]
    words = disagreement(ended, stability_percent=question.stability_percent)
    return Window(used[0] + shift_ns, used[-1] + shift_ns, steady=False, note=f"{words}; {STEADIER}{note}")
