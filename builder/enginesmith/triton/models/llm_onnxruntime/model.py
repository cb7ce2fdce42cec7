"""Triton's entry point: text requests through the batching engine beside this file.

``execute`` reads requests, hands them to the engine and returns at once; the engine's thread generates. A third thread
talks to Triton, because that waits for the server: it sends responses, and looks after every decoding step for requests
whose client has left. One thread does both, because tritonserver crashes when a sender is asked whether it is
cancelled once its final response is sent, or while it is.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from llm_batching import BatchingEngine, Engine, Failure, Job, Load, RefusedError, Update
from llm_tensors import Asked, Limits, error_response, read_request, response
from llm_text import Text

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_METRICS_PERIOD_S = 0.25
_SHORTEST_WAIT_S = 0.003
_CODES: Mapping[Failure, str] = {
    "invalid": "INVALID_ARG",
    "busy": "UNAVAILABLE",
    "late": "DEADLINE_EXCEEDED",
    "cancelled": "CANCELLED",
    "internal": "INTERNAL",
}
"""How errors are named in their text."""


@dataclass(eq=False)
class Request:
    """A request under way. ``closed`` and ``ended`` belong to the thread that talks to Triton."""

    sender: Any
    asked: Asked
    ended: dict[Job, Update] = field(default_factory=dict)
    closed: bool = False
    """The final response was sent."""


class TritonPythonModel:
    """One instance of the served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; an exception here becomes the reason that Triton gives for a failed load."""
        directory = Path(args["model_repository"]) / args["model_version"]
        serving: dict[str, Any] = json.loads((directory / "serving.json").read_text())
        cache = {"reuse": True, "reuse_tokens": 4096, "tokens_per_block": 32, **serving.get("kv_cache", {})}
        self._text = Text(directory)
        self._metrics = Metrics(args["model_name"], args["model_version"])
        self._requests: dict[Job, Request] = {}
        self._outbox: queue.SimpleQueue[Sequence[Update] | None] = queue.SimpleQueue()
        self._engine: Engine
        self._engine, vocabulary = _start_engine(directory, serving, cache, self._outbox.put)
        self._limits = Limits(
            serving["max_prompt_length"],
            serving["default_max_tokens"],
            cache["tokens_per_block"],
            vocabulary=vocabulary,
        )
        self._thread = threading.Thread(target=self._talk_to_triton, name="responses", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start ``requests`` and return at once; each is answered through its own sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(sender, read_request(request, self._text, self._limits))
            except ValueError as error:
                _send(sender, error_response(str(error), _CODES["invalid"]))
            except Exception as error:  # noqa: BLE001 - the boundary of a request: no other may be hurt.
                message = f"the request could not be read: {type(error).__name__}: {error}"
                _send(sender, error_response(message, _CODES["internal"]))

    def finalize(self) -> None:
        """End what is running, then the threads."""
        self._engine.close()
        self._outbox.put(None)
        self._thread.join()
        self._metrics.show(replace(self._engine.load(), slots=0, kv_used_bytes=0, kv_total_bytes=0))

    def _start(self, sender: Any, asked: Asked) -> None:
        started = Request(sender, asked)
        for job in asked.jobs:
            self._requests[job] = started
        try:
            self._engine.submit(asked.jobs)
        except RefusedError as error:
            # The other thread knows the request by now and may be asking its sender.
            self._outbox.put([Update(job, failure="busy", message=str(error)) for job in asked.jobs])

    def _talk_to_triton(self) -> None:
        """Send what the engine brings; after each of its steps and twice within, look for clients that left."""
        step_s, last_s = _METRICS_PERIOD_S, time.monotonic()
        while True:
            pace_s = step_s / 3 if self._requests else _METRICS_PERIOD_S
            try:
                updates = self._outbox.get(timeout=max(_SHORTEST_WAIT_S, min(_METRICS_PERIOD_S, pace_s)))
            except queue.Empty:
                updates = ()
            else:
                now_s = time.monotonic()
                step_s, last_s = now_s - last_s, now_s
            if updates is None:
                return
            for update in updates:
                self._pass_on_or_fail(update)
            try:
                self._look_for_cancelled()
                self._metrics.show(self._engine.load())
            except Exception as error:  # noqa: BLE001 - the boundary of the thread: without it nobody is answered any more.
                pb_utils.Logger.log_error(f"looking after requests failed: {type(error).__name__}: {error}")

    def _pass_on_or_fail(self, update: Update) -> None:
        """Whatever goes wrong with an update, its request gets a final response and the others theirs."""
        request = self._requests[update.job]
        if update.last:
            del self._requests[update.job]
        if request.closed:
            return
        try:
            self._pass_on(request, update)
        except Exception as error:  # noqa: BLE001 - the boundary of a request: no other may be hurt.
            message = f"the response could not be made: {type(error).__name__}: {error}"
            self._close(request, error_response(message, _CODES["internal"]))

    def _pass_on(self, request: Request, update: Update) -> None:
        if update.failure is not None:
            self._close(request, error_response(update.message, _CODES[update.failure]))
        elif not update.last:
            request.sender.send(self._response(request.asked, [update]))
        else:
            request.ended[update.job] = update
            if len(request.ended) == len(request.asked.jobs):
                ended = [request.ended[job] for job in request.asked.jobs]
                self._close(request, self._response(request.asked, ended))

    def _response(self, asked: Asked, updates: Sequence[Update]) -> Any:
        return response(asked, updates, self._text, self._limits.tokens_per_block)

    def _close(self, request: Request, last: Any) -> None:
        """Send the final response. Other rows of the request have nobody to answer to any more."""
        request.closed = True
        _send(request.sender, last)
        for job in request.asked.jobs:
            self._engine.cancel(job)

    def _look_for_cancelled(self) -> None:
        for request in {*tuple(self._requests.values())}:
            if not request.closed and request.sender.is_cancelled():
                for job in request.asked.jobs:
                    self._engine.cancel(job)


def _start_engine(
    directory: Path,
    serving: Mapping[str, Any],
    cache: Mapping[str, Any],
    emit: Callable[[Sequence[Update]], None],
) -> tuple[Engine, int]:
    """The engine that ``serving.json`` names, and how many tokens its model knows.

    Raises:
        ValueError: there is no engine of that name, or the model cannot be served with these limits.
    """
    name = serving.get("engine", "onnxruntime")
    slots, capacity = serving["max_batch_size"], serving["max_sequence_length"]
    max_waiting, max_wait_s = serving.get("max_queue_size", 0), serving.get("queue_timeout_us", 0) / 1e6
    if name == "genai":
        from llm_genai import GenaiEngine  # Needs onnxruntime-genai, which packages for onnxruntime do not.

        paged = GenaiEngine(
            directory, emit, slots=slots, capacity=capacity, max_waiting=max_waiting, max_wait_s=max_wait_s
        )
        return paged, paged.vocabulary
    if name != "onnxruntime":
        raise ValueError(f"serving.json: engine is {name!r}; allowed: onnxruntime, genai")
    from llm_runtime import Runtime  # Needs onnxruntime.

    runtime = Runtime(
        directory,
        slots=slots,
        capacity=capacity,
        threads=serving["threads"],
        reuse_tokens=cache["reuse_tokens"] if cache["reuse"] else 0,
        tokens_per_block=cache["tokens_per_block"],
        batch_invariant=serving.get("batch_invariant", False),
    )
    chunk_tokens = serving.get("prefill_chunk_tokens", 64)
    engine = BatchingEngine(
        runtime,
        emit,
        chunk_tokens=chunk_tokens,
        max_waiting=max_waiting,
        max_wait_s=max_wait_s,
        kv_bytes=runtime.kv_bytes,
    )
    return engine, runtime.engine["vocab_size"]


class Metrics:
    """Gauges and counters of this model at Triton's ``/metrics``; shown when they change."""

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        families = {
            "running": ("GAUGE", "Sequences that are being generated"),
            "waiting": ("GAUGE", "Sequences that wait for a free slot"),
            "slots": ("GAUGE", "Sequences that can be generated at once"),
            "prompt_tokens": ("COUNTER", "Tokens of prompts that were started"),
            "output_tokens": ("COUNTER", "Tokens of answers that have ended"),
            "reused_tokens": ("COUNTER", "Tokens of prompts that were in the prefix cache"),
            "kv_used_bytes": (
                "GAUGE",
                "Memory of keys and values that belong to a sequence or a kept prefix",
            ),
            "kv_total_bytes": ("GAUGE", "Memory that keys and values can take"),
        }
        self._labels = labels
        self._families = {}
        self._metrics = {}
        for name, (kind, meaning) in families.items():
            suffix = "_total" if kind == "COUNTER" else ""
            self._families[name] = pb_utils.MetricFamily(
                name=f"enginesmith_llm_{name}{suffix}",
                description=meaning,
                kind=getattr(pb_utils.MetricFamily, kind),
            )
            self._metrics[name] = self._families[name].Metric(labels=labels)
        self._steps_family = pb_utils.MetricFamily(
            name="enginesmith_llm_steps_total",
            description="Decoding steps, by the number of sequences that they advanced",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._steps: dict[int, Any] = {}
        self._shown = Load(0, 0, 0, 0, 0, 0)
        self._steps_shown_s = 0.0

    def show(self, load: Load) -> None:
        """Bring the metrics up to ``load``. Differences are added, so that instances of one model add up."""
        now_s = time.monotonic()
        if now_s - self._steps_shown_s < _METRICS_PERIOD_S and load.slots:
            # These change with every step, and the server is asked for each change.
            load = replace(load, steps=self._shown.steps, kv_used_bytes=self._shown.kv_used_bytes)
        if load == self._shown:
            return
        if load.steps != self._shown.steps:
            self._steps_shown_s = now_s
            self._show_steps(load.steps)
        for name, metric in self._metrics.items():
            if difference := getattr(load, name) - getattr(self._shown, name):
                metric.increment(difference)
        self._shown = load

    def _show_steps(self, steps: Sequence[int]) -> None:
        before = (*self._shown.steps, *(0 for _ in steps))
        for size, (now, then) in enumerate(zip(steps, before, strict=False)):
            if size not in self._steps and now:
                self._steps[size] = self._steps_family.Metric(labels=self._labels | {"batch_size": str(size)})
            if now > then:
                self._steps[size].increment(now - then)


def _send(sender: Any, last: Any) -> None:
    """Send the final response of a request."""
    try:
        sender.send(last, flags=_FINAL)
    except pb_utils.TritonModelException as error:
        pb_utils.Logger.log_error(f"a response could not be sent: {error}")
