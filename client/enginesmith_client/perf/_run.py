"""One run, whole: from a target and a profile to a directory that holds what was seen and what it means.

The only module that knows all parts of a run. ``run_profile`` measures; ``recompute`` gives the figures of a saved run
again, from nothing but its records and samples.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from enginesmith_client._client import Client
from enginesmith_client._errors import TritonClientError
from enginesmith_client.perf._errors import MeasurementError, ResultsError
from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import ClosedLoad, OpenLoad, Profile, TraceArrivals
from enginesmith_client.perf._profile_file import content_of
from enginesmith_client.perf._progress import OnProgress, Progress, ignore_progress
from enginesmith_client.perf._records import Record, RecordWriter, read_records
from enginesmith_client.perf._run_files import (
    RECORDS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    Run,
    SavedRun,
    Window,
    load_run,
    save_run,
)
from enginesmith_client.perf._saved_files import from_plain, only_writer, timestamp
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.judge._metrics import figures_of, slo_verdicts
from enginesmith_client.perf.judge._selfcheck import checks_of
from enginesmith_client.perf.load._arrivals import TRACE_FILE, due_times
from enginesmith_client.perf.load._loops import Loop, run_load
from enginesmith_client.perf.load._prepared import Due
from enginesmith_client.perf.load._wire import Wire
from enginesmith_client.perf.observe._machine import machine, versions
from enginesmith_client.perf.observe._observer import Observer
from enginesmith_client.perf.observe._samples import Sample, read_samples
from enginesmith_client.perf.perf_analyzer._measure import measure_with_perf_analyzer
from enginesmith_client.perf.workload._payload import Workload
from enginesmith_client.perf.workload._prompts_file import PROMPTS_FILE
from enginesmith_client.perf.workload._tensors_file import TENSORS_FILE
from enginesmith_client.perf.workload._workload import make_workload

Status: TypeAlias = Literal["complete", "partial"]
CAPACITY_DIRECTORY = "capacity"
_CAPACITY_WINDOW_S = 2.0
_LOAD_TIMEOUT_S = 600.0
_ANOTHER_DIRECTORY = "give another directory, or remove that one if it is not needed"


def run_profile(
    target: Target,
    profile: Profile,
    *,
    directory: Path,
    title: str = "",
    on_progress: OnProgress = ignore_progress,
    reuse: bool = False,
) -> SavedRun:
    """Measure ``profile`` on ``target`` and keep all of it in ``directory``.

    Args:
        title: what people call it; default: the profile's name and its load.
        reuse: a complete run of the same profile, model and version that is there already is returned as it is, one that
            was ended early is made again.

    Raises:
        TritonClientError: the server is not there or does not serve the model, or the profile does not fit it.
        ResultsError: ``directory`` holds another run, or any if ``reuse`` was not asked for; or it cannot be written, or
            something else is measuring into it. What was written until then is kept.
        KeyboardInterrupt: it was interrupted before there was anything to keep.
    """
    title = title or f"{profile.name}, {_load_words(profile)}"
    timeout_s = max(profile.measure.timeout_s, 60.0)
    with Client(target.url, timeout_s=timeout_s, headers=profile.requests.headers or None) as client:
        metadata = client.metadata(target.model, version=target.version)
        version = target.version_of(metadata.versions)
        digest = _digest(target, profile, version)
        with only_writer(directory, results_file=RUN_FILE):
            there = _finished_run(directory, digest, reuse=reuse)
            if there is not None:
                return there
            (directory / RUN_FILE).unlink(missing_ok=True)
            on_progress(Progress("preparing", title, 0.0, None, 0, 0, 0))
            workload = make_workload(
                client,
                target,
                profile.requests,
                seed=profile.seed,
                timeout_s=profile.measure.timeout_s,
                trace=_trace(profile),
            )
            observer = Observer(client, target, directory / SAMPLES_FILE)
            measured = _Measurement(
                client, target, profile, workload, directory, title, on_progress, observer, reuse
            ).whole()
            run = _judged(measured, target, profile, title=title, version=version, digest=digest)
            return save_run(directory, run)


def _finished_run(directory: Path, digest: str, *, reuse: bool) -> SavedRun | None:
    """The run that need not be made again; None where there is none.

    Raises:
        ResultsError: there is one that must not be written over, or what is there cannot be read.
    """
    if not (directory / RUN_FILE).exists():
        return None
    there = load_run(directory)
    if not reuse:
        raise ResultsError(f"{directory} holds a run already", hint=_ANOTHER_DIRECTORY)
    if there.run.status == "partial":
        return None
    if there.run.profile_digest != digest:
        raise ResultsError(
            f"{directory} holds a run of another profile, model or version, or its files changed since",
            hint=_ANOTHER_DIRECTORY,
        )
    return there


def recompute(saved: SavedRun) -> Figures:
    """The figures of a saved run, from its records and samples.

    Raises:
        ResultsError: they are missing or damaged.
    """
    run = saved.run
    profile = from_plain(Profile, run.profile)
    samples = read_samples(saved.directory / SAMPLES_FILE)
    return _figures(saved.records(), run.window, profile, samples)


@dataclass(frozen=True)
class _Measured:
    """What a generator and the observer brought home."""

    records: Sequence[Record]
    samples: Sequence[Sample]
    window: Window
    status: Status
    ended_because: str
    loop: Loop | None
    started: str
    described: dict[str, Any]
    server: dict[str, Any]
    command: str = ""
    tool_version: str = ""


@dataclass(frozen=True)
class _Measurement:
    """One run on its way."""

    client: Client
    target: Target
    profile: Profile
    workload: Workload
    directory: Path
    title: str
    on_progress: OnProgress
    observer: Observer
    reuse: bool

    def whole(self) -> _Measured:
        """Bring the server into its state, and measure."""
        described: dict[str, Any] = {"kind": self.workload.kind, **self.workload.described}
        rate_per_s = self._rate_per_s(described)
        if self.profile.start == "cold":
            described["load_s"] = self._load_again()
        started = timestamp()
        if isinstance(self.profile.load, ClosedLoad) and self.profile.load.generator == "perf_analyzer":
            return self._by_perf_analyzer(described, started)
        return self._by_loops(described, started, rate_per_s)

    def _by_loops(self, described: dict[str, Any], started: str, rate_per_s: float | None) -> _Measured:
        with RecordWriter(self.directory / RECORDS_FILE) as writer, self._observed() as origin_ns:
            loop = asyncio.run(self._run_load(writer, rate_per_s, origin_ns))
        if isinstance(self.profile.load, OpenLoad):
            described["generator_priority"] = "real-time" if loop.real_time else "normal"
        return self._measured(
            loop.window, loop.status, loop.ended_because, loop=loop, started=started, described=described
        )

    async def _run_load(self, writer: RecordWriter, rate_per_s: float | None, origin_ns: int) -> Loop:
        measure = self.profile.measure
        wire = Wire(self.target, timeout_s=measure.timeout_s, headers=self.profile.requests.headers)
        try:
            return await run_load(
                wire,
                self.workload,
                self.profile,
                rate_per_s=rate_per_s,
                write=writer.write,
                on_progress=self.on_progress,
                title=self.title,
                origin_ns=origin_ns,
            )
        finally:
            await wire.close()

    def _by_perf_analyzer(self, described: dict[str, Any], started: str) -> _Measured:
        with self._observed() as origin_ns:
            done = measure_with_perf_analyzer(
                self.target,
                self.workload,
                self.profile,
                directory=self.directory,
                on_progress=self.on_progress,
                origin_ns=origin_ns,
            )
        with RecordWriter(self.directory / RECORDS_FILE) as writer:
            for record in done.records:
                writer.write(record)
        return self._measured(
            done.window,
            done.status,
            done.ended_because,
            started=started,
            described=described | {"perf_analyzer_said": done.said},
            command=done.command,
            tool_version=done.version,
        )

    def _rate_per_s(self, described: dict[str, Any]) -> float | None:
        """The rate of an open loop; where it is a multiple of the capacity, that is measured first."""
        load = self.profile.load
        if not isinstance(load, OpenLoad) or load.capacity_factor is None:
            return load.rate_per_s if isinstance(load, OpenLoad) else None
        concurrency = min(64, max(16, 2 * self.client.metadata(self.target.model).max_batch_size))
        measure = self.profile.measure.model_copy(
            update={
                "window_s": _CAPACITY_WINDOW_S,
                "windows": 2,
                "max_s": 10 * _CAPACITY_WINDOW_S,
                "max_requests": None,
            }
        )
        closed = self.profile.model_copy(
            update={"load": ClosedLoad(concurrency=concurrency), "measure": measure, "start": "warm"}
        )
        run = run_profile(
            self.target,
            closed,
            directory=self.directory / CAPACITY_DIRECTORY,
            title=f"{self.title}: capacity",
            on_progress=self.on_progress,
            reuse=self.reuse,
        ).run
        if run.interrupted:
            raise KeyboardInterrupt
        if run.status == "partial" or not run.figures.requests_per_s:
            why = (
                f"its run ended early ({run.ended_because})"
                if run.status == "partial"
                else "none was answered"
            )
            raise MeasurementError(
                f"the capacity of model {self.target.model!r} is unknown: with {concurrency} requests in flight {why}",
                hint="the errors are in the records of the capacity run; a rate_per_s needs no capacity",
            )
        described["capacity_per_s"] = run.figures.requests_per_s
        if run.void:
            # It is a rate to aim at all the same, and the run itself is judged by its own checks.
            described["capacity_doubted"] = "; ".join(
                one.words for one in run.checks if one.severity == "void"
            )
        return run.figures.requests_per_s * load.capacity_factor

    def _load_again(self) -> float:
        """Unload and load the model; how long loading took, in seconds. An interruption leaves it loaded."""
        model, version = self.target.model, self.target.version
        # The server may have been told to serve a version that its repository's configuration does not name.
        config = self.client.config(model, version=version) if version else None
        try:
            self.client.unload(model, timeout_s=_LOAD_TIMEOUT_S)
            begun_s = time.monotonic()
            self.client.load(model, config=config, timeout_s=_LOAD_TIMEOUT_S)
            self.client.wait_ready(model, timeout_s=_LOAD_TIMEOUT_S)
        except KeyboardInterrupt:
            self.client.load(model, config=config, timeout_s=_LOAD_TIMEOUT_S)
            raise
        return time.monotonic() - begun_s

    @contextmanager
    def _observed(self) -> Iterator[int]:
        """Have the server and the machine observed meanwhile; gives the run's origin on the monotonic clock."""
        origin_ns = time.monotonic_ns()
        try:
            self.observer.start(origin_ns)
            yield origin_ns
        finally:
            self.observer.stop()

    def _measured(
        self,
        window: Window,
        status: Status,
        ended_because: str,
        *,
        started: str,
        described: dict[str, Any],
        loop: Loop | None = None,
        command: str = "",
        tool_version: str = "",
    ) -> _Measured:
        return _Measured(
            records=read_records(self.directory / RECORDS_FILE),
            samples=read_samples(self.directory / SAMPLES_FILE),
            window=window,
            status=status,
            ended_because=ended_because,
            loop=loop,
            started=started,
            described=described,
            server=self._server(),
            command=command,
            tool_version=tool_version,
        )

    def _server(self) -> dict[str, Any]:
        notes = list(self.observer.notes)
        try:
            config = self.client.config(self.target.model, version=self.target.version)
        except TritonClientError as error:
            return {"notes": [*notes, f"its configuration could not be read after the run: {error.message}"]}
        return {"notes": notes, "config": config}


def _judged(
    measured: _Measured, target: Target, profile: Profile, *, title: str, version: str, digest: str
) -> Run:
    """What was measured, with its figures and what may be thought of them."""
    window, records, samples = measured.window, measured.records, measured.samples
    figures = _figures(records, window, profile, samples)
    by_perf_analyzer = bool(measured.command)
    generator = "perf_analyzer" if by_perf_analyzer else "enginesmith"
    checks = checks_of(records, window, figures, samples, profile, loop=measured.loop, generator=generator)
    tools = {"perf_analyzer": measured.tool_version} if by_perf_analyzer else {}
    return Run(
        title=title,
        model=target.model,
        model_version=version,
        url=target.url,
        profile=profile.as_kept(),
        profile_digest=digest,
        started=measured.started,
        generator=generator,
        status=measured.status,
        ended_because=measured.ended_because,
        window=window,
        figures=figures,
        checks=tuple(checks),
        slo=slo_verdicts(figures, profile.slo),
        machine=machine(),
        versions=versions() | tools,
        server=measured.server,
        workload=measured.described,
        command=measured.command,
    )


def _figures(
    records: Sequence[Record], window: Window, profile: Profile, samples: Sequence[Sample]
) -> Figures:
    closed = isinstance(profile.load, ClosedLoad)
    return figures_of(records, window, profile, samples, closed=closed)


def _trace(profile: Profile) -> Iterator[Due]:
    """What is due, where the profile gives it one by one."""
    load = profile.load
    if isinstance(load, OpenLoad) and isinstance(load.arrivals, TraceArrivals):
        yield from due_times(load, rate_per_s=None, seed=profile.seed)


def _digest(target: Target, profile: Profile, version: str) -> str:
    """Of all that decides what is measured: the profile with the files that it names, the model and its version.

    Raises:
        ProfileError: a file cannot be read.
    """
    requests, load = profile.requests, profile.load
    files = [(PROMPTS_FILE, requests.prompts_file), (TENSORS_FILE, requests.tensors_file)]
    if isinstance(load, OpenLoad) and isinstance(load.arrivals, TraceArrivals):
        files.append((TRACE_FILE, load.arrivals.file))
    digests = [
        hashlib.sha256(content_of(file, what=what)).hexdigest() for what, file in files if file is not None
    ]
    content = [profile.as_json(), target.model, version, digests]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load_words(profile: Profile) -> str:
    load = profile.load
    if isinstance(load, ClosedLoad):
        return f"{load.concurrency} at a time"
    if isinstance(load.arrivals, TraceArrivals):
        return f"trace {load.arrivals.file.name}"
    if load.rate_per_s is None:
        return f"{load.arrivals.kind} at {load.capacity_factor:g} times the capacity"
    return f"{load.arrivals.kind} at {load.rate_per_s:g}/s"
