"""In-flight batching: requests join the running batch between two tokens and leave it when they are done.

``BatchingEngine`` owns one thread that owns the runtime, whichever ``Batch`` that is. It knows nothing of Triton: jobs come in through ``submit``, and
what becomes of them goes out through ``emit``, in that thread. Between two decoding steps at most ``chunk_tokens``
tokens of prompts are computed, so that a long prompt does not hold up the answers that are being generated.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING or __package__:
    from enginesmith.triton.models.llm_onnxruntime.llm_pieces import AnswerText
    from enginesmith.triton.models.llm_onnxruntime.llm_sampling import Generation
else:  # Beside the engine, where there is no package.
    from llm_pieces import AnswerText
    from llm_sampling import Generation

_LOG = logging.getLogger(__name__)

Failure = Literal["invalid", "busy", "late", "cancelled", "internal"]
"""By who must act: the client; nobody, try again later; nobody, the time that the client gave is over; nobody, the
client left; the operator."""


@dataclass(eq=False)
class Job:
    """One sequence on its way through the engine. Changed in the engine's thread only, but for ``cancelled``."""

    generation: Generation
    text: AnswerText
    streaming: bool = False
    timeout_s: float | None = None
    """How long it may take from its arrival to its last token; None: as long as it takes."""
    cancelled: bool = False
    """The client left. Set by ``BatchingEngine.cancel``, from any thread."""
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    _piece: list[str] = field(default_factory=list)
    _told: int = 0

    def __post_init__(self) -> None:
        self.generation.on_token = self._read_token

    def _read_token(self, generation: Generation) -> bool:
        token = generation.tokens[-1]
        self.last_token_ns = time.monotonic_ns()
        if not self.first_token_ns:
            self.first_token_ns = self.last_token_ns
        if piece := self.text.add(token):
            self._piece.append(piece)
        return self.text.stopped

    def take(self, *, ended: str | None = None) -> Update | None:
        """What is new since the last time; None when there is nothing to show."""
        reason = ended
        if ended is not None and not self.text.stopped:
            self._piece.append(self.text.finish())
            reason = "stop" if self.text.stopped else ended
        if ended is None and not self._piece:
            return None
        generation = self.generation
        first, self._told = self._told, len(generation.tokens)
        update = Update(
            self,
            "".join(self._piece),
            self._told,
            tuple(generation.tokens[first:]) if generation.sampling.logprobs else (),
            tuple(generation.logprobs[first:]),
            finish_reason=reason,
        )
        self._piece.clear()
        return update


@dataclass(frozen=True)
class Update:
    """A new piece of an answer. The one with a ``finish_reason`` or a ``failure`` is the last of its job."""

    job: Job
    text: str = ""
    output_tokens: int = 0
    """Of the whole answer so far."""
    tokens: tuple[int, ...] = ()
    """Those of this piece, with their ``logprobs``, if these were asked for."""
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    failure: Failure | None = None
    message: str = ""

    @property
    def last(self) -> bool:
        """Nothing follows for this job."""
        return self.finish_reason is not None or self.failure is not None


@dataclass(frozen=True)
class Load:
    """How busy an engine is, and what it has done since it was made."""

    running: int
    waiting: int
    slots: int
    prompt_tokens: int
    output_tokens: int
    reused_tokens: int
    steps: tuple[int, ...] = ()
    """Decoding steps by the number of sequences that they advanced, from none up."""
    kv_used_bytes: int = 0
    """Keys and values that belong to a sequence or to a prefix that is kept."""
    kv_total_bytes: int = 0


class Engine(Protocol):
    """Whoever generates. ``submit`` never waits; every job that it accepted gets exactly one last update."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``, all or none. Raises ``RefusedError``."""

    def cancel(self, job: Job) -> None:
        """End ``job`` before its next token."""

    def load(self) -> Load:
        """How busy the engine is."""

    def close(self) -> None:
        """End what is running; every job gets its last update before this returns."""


class Batch(Protocol):
    """Sequences that are generated together: what ``BatchingEngine`` needs of a runtime, in its own thread only.

    ``llm_runtime.Runtime`` computes one prompt at a time when it is told to. A runtime that schedules prompts by itself
    has none that is ``prefilling``, and its ``prefill`` does nothing.
    """

    slots: int
    running: list[Generation]
    """Those that joined; the finished ones until ``retire``."""

    @property
    def free_slots(self) -> int:
        """How many more sequences can start now."""

    @property
    def prefilling(self) -> Generation | None:
        """The sequence that was admitted and did not join yet."""

    @property
    def prefill_left(self) -> int:
        """How many tokens of the admitted prompt are not computed yet."""

    def admit(self, sequence: Generation) -> None:
        """Give ``sequence`` a slot. Raises ``ValueError`` for one that can never be served."""

    def prefill(self, max_tokens: int) -> int:
        """Compute up to ``max_tokens`` more of the admitted prompt; returns how many."""

    def drop_prefill(self) -> None:
        """Give up the sequence that is being prefilled."""

    def step(self) -> None:
        """Advance the running sequences."""

    def retire(self) -> list[Generation]:
        """Remove and return the finished sequences."""

    def clear(self) -> None:
        """Forget every sequence."""


class RefusedError(Exception):
    """The engine does not take a job now."""


def _no_kv_bytes() -> tuple[int, int]:
    return 0, 0


class BatchingEngine:
    """The ``Engine`` over one ``Batch``.

    ``emit`` is called in the engine's thread before every step, also with nothing new (so that its owner can look for
    clients that left); it must not wait and must not raise. ``max_waiting`` and ``max_wait_s`` bound the queue; 0 is no bound.
    ``kv_bytes`` tells how much memory keys and values take, and how much they can; 0: unknown.
    """

    def __init__(
        self,
        runtime: Batch,
        emit: Callable[[Sequence[Update]], None],
        *,
        chunk_tokens: int = 128,
        max_waiting: int = 0,
        max_wait_s: float = 0.0,
        kv_bytes: Callable[[], tuple[int, int]] = _no_kv_bytes,
    ) -> None:
        self._runtime = runtime
        self._emit = emit
        self._chunk_tokens = chunk_tokens
        self._max_waiting, self._max_wait_s = max_waiting, max_wait_s
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: dict[int, Job] = {}
        """By the identity of their generations: those in the runtime."""
        self._closing = False
        self._prompt_tokens = self._output_tokens = self._reused_tokens = 0
        self._steps = [0] * (runtime.slots + 1)
        self._kv_bytes = kv_bytes
        self._kv_used_bytes, self._kv_total_bytes = 0, kv_bytes()[1]
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue ``jobs``, all or none.

        Raises:
            RefusedError: the queue is full, or the engine is closed.
        """
        with self._changed:
            if self._closing:
                raise RefusedError("the model is being unloaded")
            # Jobs that will find a slot at the next step do not wait for one.
            beyond = len(self._waiting) + len(jobs) - max(0, self._runtime.slots - len(self._active))
            if self._max_waiting and beyond > self._max_waiting:
                raise RefusedError(
                    f"the queue is full: {len(self._waiting)} requests wait, at most {self._max_waiting} may; try again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End ``job`` before its next token; without effect on one that has ended."""
        job.cancelled = True

    def load(self) -> Load:
        """How busy the engine is."""
        with self._changed:
            active, waiting = len(self._active), len(self._waiting)
        return Load(
            active,
            waiting,
            self._runtime.slots,
            self._prompt_tokens,
            self._output_tokens,
            self._reused_tokens,
            tuple(self._steps),
            self._kv_used_bytes,
            self._kv_total_bytes,
        )

    def close(self) -> None:
        """End what is running; every job gets its last update before this returns."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - the boundary of the thread: everybody must get an answer.
                _LOG.exception("generation failed")
                self._fail_all(f"generation failed: {type(error).__name__}: {error}", "internal")
        self._fail_all("the model is being unloaded", "busy")

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closing or self._waiting or self._active):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        """One decoding step of all that is running, and what may happen before it."""
        self._emit(self._drop_ended())
        self._prefill()
        if self._runtime.running:
            self._steps[len(self._runtime.running)] += 1
            self._runtime.step()
            self._harvest()
        self._kv_used_bytes, self._kv_total_bytes = self._kv_bytes()

    def _prefill(self) -> None:
        """Compute prompts of waiting jobs, up to ``chunk_tokens`` tokens.

        A prompt is cut every ``chunk_tokens`` tokens and nowhere else: other pieces would round differently, and an answer
        would depend on who else came.
        """
        left = self._chunk_tokens
        while self._runtime.prefilling is not None or self._admit():
            if min(self._chunk_tokens, self._runtime.prefill_left) > left:
                return
            left -= self._runtime.prefill(self._chunk_tokens)
            self._harvest()

    def _admit(self) -> bool:
        """Give the job that has waited longest a slot; returns whether one was given."""
        while self._runtime.free_slots:
            with self._changed:
                if not self._waiting:
                    return False
                job = self._waiting.popleft()
                self._active[id(job.generation)] = job
            job.scheduled_ns = time.monotonic_ns()
            try:
                self._runtime.admit(job.generation)
            except ValueError as error:
                self._forget(job)
                self._emit([Update(job, failure="invalid", message=str(error))])
                continue
            self._prompt_tokens += len(job.generation.prompt)
            self._reused_tokens += job.generation.reused_tokens
            return True
        return False

    def _harvest(self) -> None:
        """Emit what the runtime's last pass brought; finished sequences leave it."""
        updates = []
        try:
            for generation in self._runtime.running:
                job = self._active[id(generation)]
                if job.streaming and generation.finish_reason is None and (update := job.take()):
                    updates.append(update)
            for generation in self._runtime.retire():
                job = self._active[id(generation)]
                updates.append(_last_update(job))
                self._forget(job)
                self._output_tokens += len(generation.tokens)
        finally:
            # Whatever fails here or later: nobody else has the last update of a job that is forgotten.
            if updates:
                self._emit(updates)

    def _drop_ended(self) -> list[Update]:
        """End jobs whose client left or whose time is up, wherever they are."""
        now_ns = time.monotonic_ns()
        with self._changed:
            doomed = [(job, ended) for job in self._waiting if (ended := self._ended_waiting(job, now_ns))]
            if doomed:
                gone = {id(job) for job, _ in doomed}
                self._waiting = deque(job for job in self._waiting if id(job) not in gone)
        running = [(job, ended) for job in self._active.values() if (ended := _ended_running(job, now_ns))]
        for job, _ in running:
            self._output_tokens += len(job.generation.tokens)
            self._forget(job)
            if self._runtime.prefilling is job.generation:
                self._runtime.drop_prefill()
            job.generation.finish_reason = "cancelled"
        if running:
            self._runtime.retire()
        return [ended for _, ended in (*doomed, *running)]

    def _ended_waiting(self, job: Job, now_ns: int) -> Update | None:
        waited_s = (now_ns - job.arrived_ns) / 1e9
        if job.cancelled:
            return Update(job, failure="cancelled", message="the request was cancelled")
        limits: tuple[tuple[float | None, Failure], ...] = (
            (job.timeout_s, "late"),
            (self._max_wait_s, "busy"),
        )
        for limit_s, failure in limits:
            if limit_s and waited_s > limit_s:
                message = f"the request waited {waited_s:.3f} s for a free slot, at most {limit_s:g} s are allowed; try again later"
                return Update(job, failure=failure, message=message)
        return None

    def _forget(self, job: Job) -> None:
        with self._changed:
            del self._active[id(job.generation)]

    def _fail_all(self, message: str, failure: Failure) -> None:
        with self._changed:
            jobs: Iterable[Job] = [*self._active.values(), *self._waiting]
            self._active.clear()
            self._waiting.clear()
            self._runtime.clear()
        self._emit([Update(job, failure=failure, message=message) for job in jobs])


def _ended_running(job: Job, now_ns: int) -> Update | None:
    if job.cancelled:
        return Update(job, failure="cancelled", message="the request was cancelled")
    if job.timeout_s and (now_ns - job.arrived_ns) / 1e9 > job.timeout_s:
        count = len(job.generation.tokens)
        message = f"the request's timeout of {job.timeout_s:g} s has passed after {count} tokens"
        return Update(job, failure="late", message=message)
    return None


def _last_update(job: Job) -> Update:
    if job.generation.error is not None:
        return Update(job, failure="internal", message=str(job.generation.error))
    update = job.take(ended=job.generation.finish_reason)
    assert update is not None
    return update
