"""Looks at the server, the machine and this process once a second while load runs, and keeps what it sees.

A thread beside the generator of load: a look costs some 3 ms of CPU, most of it in the kernel and in pieces far below a
millisecond, so that a generator that shares the process hardly feels it. What cannot be seen is missing in the samples;
nothing that goes wrong here ends a run. Statistics come over the client, the rest from ``/metrics``, from the system and
from NVML.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from enginesmith_client._client import Client
from enginesmith_client._errors import TritonClientError
from enginesmith_client._messages import ModelStatistics
from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.observe._gpus import Gpus
from enginesmith_client.perf.observe._processes import (
    OwnProcesses,
    ServerProcesses,
    machine_cpu_s,
    suspended_s,
    swap_in_pages,
    wall_ahead_s,
)
from enginesmith_client.perf.observe._samples import ModelCounts, Sample, SampleWriter
from enginesmith_client.perf.observe._scrape import MetricsPage, parse_metrics

_TIMEOUT_S = 1.0
_CONFIG_TIMEOUT_S = 10.0


class Observer:
    """Takes samples from ``start`` to ``stop``, at both too, and appends each to ``path``."""

    def __init__(self, client: Client, target: Target, path: Path, *, interval_s: float = 1.0) -> None:
        self._client, self._target, self._path = client, target, path
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writer: SampleWriter | None = None
        self._page: MetricsPage | None = None
        self._origin_ns = 0
        self._models: tuple[str, ...] = (target.model,)
        self._samples: list[Sample] = []
        self._notes: list[str] = []

    @property
    def samples(self) -> Sequence[Sample]:
        """Those so far."""
        return tuple(self._samples)

    @property
    def notes(self) -> tuple[str, ...]:
        """What it cannot see, and why, in words."""
        return tuple(self._notes)

    def start(self, origin_ns: int) -> None:
        """Take the first sample, and from then on one every ``interval_s``. Times count from ``origin_ns``, monotonic."""
        assert self._thread is None, "the observer was already started"
        self._origin_ns = origin_ns
        self._own, self._gpus = OwnProcesses(), Gpus()
        self._server = ServerProcesses(self._target)
        self._page = MetricsPage(self._target.metrics_url) if self._target.metrics_url else None
        self._models = self._composed()
        self._writer = SampleWriter(self._path)
        self._take()
        self._notes += self._missing()
        self._thread = threading.Thread(target=self._watch, name="observer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample, if there was a first. Without effect when it is stopped."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._take()
        if self._writer is not None:
            with self._noting_what_is_lost():
                self._writer.close()
        if self._page is not None:
            self._page.close()

    def _watch(self) -> None:
        due_s = time.monotonic() + self._interval_s
        while not self._ended.wait(max(0.0, due_s - time.monotonic())):
            self._take()
            # After a look that took long the missed ones are left out.
            due_s = max(due_s + self._interval_s, time.monotonic())

    def _take(self) -> None:
        sample = self._sample()
        self._samples.append(sample)
        if self._writer is not None:
            with self._noting_what_is_lost():
                self._writer.write(sample)

    @contextmanager
    def _noting_what_is_lost(self) -> Iterator[None]:
        try:
            yield
        except ResultsError as error:
            note = f"samples could not be kept: {error.message}"
            if note not in self._notes:
                self._notes.append(note)

    def _sample(self) -> Sample:
        begun_ns = time.monotonic_ns()
        statistics = self._counts(self._target.model, self._target.version)
        composing = {name: counts for name in self._models[1:] if (counts := self._counts(name)) is not None}
        at_ns = (begun_ns + time.monotonic_ns()) // 2
        seen = self._server.look(answers=statistics is not None)
        gpu = self._gpus.usage() if self._server.identity else None
        busy_s, total_s, stolen_s = machine_cpu_s()
        client_cpu_s = self._own.cpu_s()
        metrics = self._metrics()
        return Sample(
            at_ns=at_ns - self._origin_ns,
            wall_ahead_s=wall_ahead_s(),
            suspended_s=suspended_s(),
            took_ms=(time.monotonic_ns() - begun_ns) / 1e6,
            statistics=statistics,
            composing=composing,
            metrics=metrics,
            client_cpu_s=client_cpu_s,
            machine_busy_s=busy_s,
            machine_total_s=total_s,
            machine_stolen_s=stolen_s,
            swap_in_pages=swap_in_pages(),
            server=self._server.identity,
            server_cpu_s=seen[0] if seen else None,
            server_rss_bytes=seen[1] if seen else None,
            gpu_percent=gpu[0] if gpu else None,
            gpu_memory_bytes=gpu[1] if gpu else None,
        )

    def _counts(self, model: str, version: str = "") -> ModelCounts | None:
        try:
            versions = self._client.statistics(model, version=version, timeout_s=_TIMEOUT_S)
        except TritonClientError:
            return None
        return summed(versions) if versions else None

    def _metrics(self) -> dict[str, float]:
        page = self._page.read() if self._page else None
        return parse_metrics(page, self._models) if page else {}

    def _composed(self) -> tuple[str, ...]:
        """The model and, where it is an ensemble, the models that it is composed of, at any depth."""
        names: dict[str, None] = {self._target.model: None}
        seen: set[str] = set()
        try:
            while left := [name for name in names if name not in seen]:
                for name in left:
                    seen.add(name)
                    steps = (
                        self._client.config(name, timeout_s=_CONFIG_TIMEOUT_S)
                        .get("ensemble_scheduling", {})
                        .get("step", ())
                    )
                    names |= {step["model_name"]: None for step in steps}
        except TritonClientError as error:
            self._notes.append(f"the model's configuration cannot be read: {error.message}")
        return tuple(names)

    def _missing(self) -> list[str]:
        first = self._samples[0]
        notes = []
        if first.statistics is None:
            notes.append("the server gives no statistics of the model")
        if self._server.unseen:
            notes.append(f"CPU and memory of the server are not seen: {self._server.unseen}")
        if self._page is None:
            notes.append("no address of the server's metrics was given")
        elif self._page.read() is None:
            notes.append(f"the server's metrics cannot be read at {self._target.metrics_url}")
        return notes


def summed(versions: Sequence[ModelStatistics]) -> ModelCounts:
    """The statistics of all loaded versions together."""
    batches: dict[int, int] = {}
    for version in versions:
        for batch in version.batches:
            batches[batch.batch_size] = batches.get(batch.batch_size, 0) + batch.compute_infer.count
    return ModelCounts(
        success=sum(one.success.count for one in versions),
        fail=sum(one.fail.count for one in versions),
        inferences=sum(one.inference_count for one in versions),
        executions=sum(one.execution_count for one in versions),
        queue_s=sum(one.queue.total_s for one in versions),
        queue_count=sum(one.queue.count for one in versions),
        compute_input_s=sum(one.compute_input.total_s for one in versions),
        compute_infer_s=sum(one.compute_infer.total_s for one in versions),
        compute_output_s=sum(one.compute_output.total_s for one in versions),
        compute_count=sum(one.compute_infer.count for one in versions),
        cache_hits=sum(one.cache_hit.count for one in versions),
        batches=dict(sorted(batches.items())),
    )
