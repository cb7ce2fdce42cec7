"""Load: requests of a workload over a wire, in a closed loop or an open one, until the measurement is steady or over.

Everything happens in one event loop of one process. In a closed loop so many workers ask one after the other. In an
open loop requests are sent when they are due, whatever became of earlier ones, and their latency counts from when they
were due: a server that stands still does not keep the generator from asking, nor hides the waiting of those who would
have asked meanwhile (no coordinated omission). What the generator itself delays is in the records, as
``Record.lag_ns``.

Records are handed out a few at a time between other work, so that requests that are due do not wait for them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from enginesmith_client.perf._profile import ClosedLoad, Profile
from enginesmith_client.perf._progress import OnProgress, Phase, Progress
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.load._arrivals import due_times
from enginesmith_client.perf.load._measured import Ending, Measured
from enginesmith_client.perf.load._prepared import Due, Prepared
from enginesmith_client.perf.load._tally import Tally
from enginesmith_client.perf.load._timer import Timer
from enginesmith_client.perf.load._undisturbed import ahead_of_others, on_interrupt, undisturbed
from enginesmith_client.perf.load._wire import Answer, Wire

_NS = 1_000_000_000
TICK_S = 0.25
CONNECT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.1
_WRITTEN_AT_ONCE = 4
_INTERRUPTED = Ending("partial", "interrupted")
_CUT_OFF = Ending("partial", "interrupted while the last answers were waited for")

Write: TypeAlias = Callable[[Record], None]


class Requests(Protocol):
    """Gives the requests of a load; it must not take long, since it is asked while the load goes on."""

    def request(self, number: int, due: Due | None = None) -> Prepared:
        """The request with this number, of the lengths that ``due`` asks for, if any."""
        ...


@dataclass(frozen=True)
class Loop:
    """How a load went. What it measured went to ``write``."""

    origin_ns: int
    """Of the monotonic clock: the zero of all times in records and ``window``."""
    origin_unix_s: float
    window: Window
    status: Literal["complete", "partial"]
    ended_because: str
    """``steady``, ``max_s``, ``max_requests``, ``the trace is over``, ``server lost`` or ``interrupted``, and details."""
    client_cpu_s: float
    """CPU time of this process within the window."""
    wall_vs_monotonic_s: float
    """How far the wall clock moved against the monotonic one while the load went on."""
    real_time: bool = False
    """Whether an open loop was sent with real-time priority."""


async def run_load(
    wire: Wire,
    requests: Requests,
    profile: Profile,
    *,
    rate_per_s: float | None,
    write: Write,
    on_progress: OnProgress,
    stop: asyncio.Event | None = None,
    title: str = "",
    origin_ns: int | None = None,
) -> Loop:
    """Send the load that ``profile`` describes and wait for its answers; every request becomes a record.

    Failures of requests are records, not errors. Ctrl-C ends the load like ``stop`` does: what was measured is kept.
    Garbage collection is off meanwhile. ``on_progress`` is called in the event loop and must return at once.

    Args:
        rate_per_s: of an open loop, in place of the profile's.
        origin_ns: of the monotonic clock; default: when the load begins.

    Raises:
        ProfileError: the arrivals of an open loop cannot be made.
    """
    load = profile.load
    # Before anything is sent, because a trace may be unusable.
    dues = None if isinstance(load, ClosedLoad) else due_times(load, rate_per_s=rate_per_s, seed=profile.seed)
    with undisturbed(), ahead_of_others(wanted=dues is not None) as real_time:
        await wire.connect(timeout_s=min(CONNECT_S, profile.measure.timeout_s))
        run = _Load(wire, requests, profile, write=write, origin_ns=origin_ns)
        with on_interrupt(run.interrupt):
            if dues is None:
                sending: Awaitable[object] = asyncio.gather(*run.workers())
            else:
                sending = asyncio.ensure_future(run.send_when_due(dues))
            report = _Reports(run, on_progress, title)
            loop = await _until_over(run, sending, stop, report)
            return replace(loop, real_time=real_time)


class _Load:
    """A load on its way: the requests in flight and what came of the others."""

    def __init__(
        self, wire: Wire, requests: Requests, profile: Profile, *, write: Write, origin_ns: int | None
    ) -> None:
        self._wire = wire
        self._requests = requests
        self._write = write
        self._profile = profile
        self.origin_ns = time.monotonic_ns() if origin_ns is None else origin_ns
        self.origin_unix_s = time.time() - (time.monotonic_ns() - self.origin_ns) / _NS
        self.start_ns = self.now_ns()
        self.measured = Measured(profile, self.start_ns)
        self.tally = Tally()
        self.ending: Ending | None = None
        self.ended_ns = 0
        self.ended = asyncio.Event()
        self.failure: BaseException | None = None
        """A defect of ours, met while an answer was read."""
        self.in_flight = 0
        self.answering: set[asyncio.Task[object]] = set()
        self._numbers = itertools.count()
        self._finished: deque[tuple[int, int, Prepared, Answer]] = deque()
        self._unwritten = asyncio.Event()

    @property
    def drain_s(self) -> float:
        """How long answers are waited for after the last request."""
        return 0.0 if self.interrupted else self._profile.measure.drain_s

    @property
    def interrupted(self) -> bool:
        """Whether somebody does not want to wait any longer."""
        return self.ending in (_INTERRUPTED, _CUT_OFF)

    def now_ns(self) -> int:
        """Since the origin."""
        return time.monotonic_ns() - self.origin_ns

    def end(self, ending: Ending) -> None:
        """Send no more. Only the first reason counts."""
        if self.ending is None:
            self.ending = ending
            self.ended_ns = self.now_ns()
            self.ended.set()

    def interrupt(self) -> None:
        """Send no more, and do not wait for the answers that are on their way."""
        if self.ending is None:
            self.end(_INTERRUPTED)
        elif not self.interrupted:
            self.ending = _CUT_OFF

    def workers(self) -> list[asyncio.Task[object]]:
        """The closed loop: tasks that ask until the load ends."""
        load = self._profile.load
        assert isinstance(load, ClosedLoad)
        self.answering = {asyncio.create_task(self._ask_on_and_on()) for _ in range(load.concurrency)}
        return list(self.answering)

    async def send_when_due(self, dues: Iterable[Due]) -> None:
        """The open loop: return after the last request was sent, whatever was answered."""
        load = self._profile.load
        assert not isinstance(load, ClosedLoad)
        first_ns = self.origin_ns + self.start_ns
        timer, looked_ns = Timer(), 0
        try:
            for due in dues:
                number = next(self._numbers)
                request = self._requests.request(number, due)
                at_ns = first_ns + due.at_ns
                if at_ns > looked_ns:
                    # Also when it is late already: whoever has an answer must get its turn.
                    await timer.until(at_ns) if at_ns > time.monotonic_ns() else await asyncio.sleep(0)
                    looked_ns = time.monotonic_ns()
                if self.ending is not None:
                    return
                self._send(number, at_ns, request)
                if len(self.answering) > load.max_in_flight:
                    self.end(Ending("partial", _too_many(load.max_in_flight)))
        finally:
            timer.close()

    async def write_out(self) -> None:
        """Hand out records for as long as it is let."""
        while True:
            await self._unwritten.wait()
            self._unwritten.clear()
            while self._finished:
                self._write_some(_WRITTEN_AT_ONCE)
                await asyncio.sleep(0)

    def write_rest(self) -> None:
        """Hand out the records that are left."""
        self._write_some(len(self._finished))

    def _send(self, number: int, at_ns: int, request: Prepared) -> None:
        ending = self.measured.was_due(at_ns - self.origin_ns)
        if ending is not None:
            self.end(ending)
        # The call is begun here and not in the task: that saves a turn of the event loop.
        task = asyncio.create_task(self._answer(number, request, self._wire.send(request), due_ns=at_ns))
        self.answering.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[object]) -> None:
        self.answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure = error

    async def _ask_on_and_on(self) -> None:
        pause_s = 0.0
        while self.ending is None:
            number = next(self._numbers)
            request = self._requests.request(number)
            answer = await self._answer(number, request, self._wire.send(request), due_ns=None)
            if answer.outcome in ("ok", "deadline"):
                pause_s = 0.0
                continue
            # Failures come at once; without a pause they would be all that the machine does.
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _answer(
        self, number: int, request: Prepared, coming: Awaitable[Answer], *, due_ns: int | None
    ) -> Answer:
        """Wait for an answer and note it. ``due_ns`` (absolute) is None in a closed loop."""
        begun_ns = time.monotonic_ns()
        self.in_flight += 1
        try:
            answer = await coming
        except asyncio.CancelledError:
            words = f"no answer {self.drain_s:g} s after the load ended"
            self._note(number, request, Answer("cancelled", words, time.monotonic_ns(), sent_ns=begun_ns), due_ns)  # fmt: skip
            raise
        finally:
            self.in_flight -= 1
        self._note(number, request, answer, due_ns)
        return answer

    def _note(self, number: int, request: Prepared, answer: Answer, due_ns: int | None) -> None:
        if due_ns is None:
            due_ns = answer.sent_ns
        ended_ns, latency_ns = answer.ended_ns - self.origin_ns, answer.ended_ns - due_ns
        self.tally.add(answer, ended_ns=ended_ns, latency_ns=latency_ns)
        if self.ending is None:
            ending = self.measured.ended(ended_ns, latency_ns=latency_ns, ok=answer.outcome == "ok")
            if ending is not None:
                self.end(ending)
        self._finished.append((number, due_ns, request, answer))
        self._unwritten.set()

    def _write_some(self, count: int) -> None:
        for _ in range(min(count, len(self._finished))):
            self._write(self._record(*self._finished.popleft()))

    def _record(self, number: int, due_ns: int, request: Prepared, answer: Answer) -> Record:
        origin_ns = self.origin_ns
        prompt_tokens = answer.prompt_tokens
        return Record(
            number,
            due_ns - origin_ns,
            answer.sent_ns - origin_ns,
            answer.ended_ns - origin_ns,
            answer.outcome,
            answer.error,
            request.rows,
            request.prompt_tokens if prompt_tokens is None else prompt_tokens,
            answer.output_tokens,
            tuple([piece_ns - origin_ns for piece_ns in answer.piece_ns]),
        )


class _Reports:
    """Tells what a load does, and keeps the CPU time that this process had used at each moment."""

    def __init__(self, run: _Load, on_progress: OnProgress, title: str) -> None:
        self._run = run
        self._on_progress = on_progress
        self._title = title
        self._cpu: list[tuple[int, float]] = [(run.start_ns, time.process_time())]

    def tell(self, phase: Phase, *, latest_ns: int | None) -> None:
        """One report."""
        run = self._run
        now_ns = run.now_ns()
        self._cpu.append((now_ns, time.process_time()))
        recent = run.tally.recent(now_ns)
        self._on_progress(
            Progress(
                phase,
                self._title,
                elapsed_s=(now_ns - run.start_ns) / _NS,
                planned_s=None if latest_ns is None else (latest_ns - run.start_ns) / _NS,
                answered=run.tally.answered,
                failed=run.tally.failed,
                in_flight=run.in_flight,
                requests_per_s=recent.requests_per_s,
                tokens_per_s=recent.tokens_per_s,
                p50_ms=recent.p50_ms,
                p99_ms=recent.p99_ms,
            )
        )

    def cpu_s(self, window: Window) -> float:
        """CPU time within ``window``."""
        at_ns, used_s = zip(*self._cpu, strict=True)
        start_s, end_s = np.interp((window.start_ns, window.end_ns), at_ns, used_s)
        return float(end_s - start_s)


async def _until_over(
    run: _Load, sending: Awaitable[object], stop: asyncio.Event | None, reports: _Reports
) -> Loop:
    """Watch the load until it ends, wait for its last answers, and sum up."""
    sender = asyncio.ensure_future(sending)
    writer = asyncio.create_task(run.write_out())
    ended = asyncio.create_task(run.ended.wait())
    try:
        while run.ending is None:
            await asyncio.wait(
                {sender, writer, ended}, timeout=_look_again_s(run), return_when=asyncio.FIRST_COMPLETED
            )
            _look_at(run, sender, writer, stop)
            reports.tell(run.measured.phase, latest_ns=run.measured.latest_ns)
        window = run.measured.window(run.ended_ns, run.ending)
        await _drain(run, reports)
    finally:
        run.end(_INTERRUPTED)
        # A task that is cancelled before its first step would leave no record.
        await asyncio.sleep(0)
        for task in (sender, writer, ended, *run.answering):
            task.cancel()
        await asyncio.gather(sender, writer, ended, *run.answering, return_exceptions=True)
        if writer.cancelled():
            run.write_rest()
    _raise_failure(run, sender, writer)
    reports.tell("done", latest_ns=None)
    moved_s = (time.time() - run.origin_unix_s) - run.now_ns() / _NS
    return Loop(
        run.origin_ns,
        run.origin_unix_s,
        window,
        run.ending.status,
        run.ending.words,
        reports.cpu_s(window),
        moved_s,
    )


def _look_again_s(run: _Load) -> float:
    """When to look at the load next: soon, and right when its phase can end."""
    left_s = (run.measured.decides_ns - run.now_ns()) / _NS
    return min(TICK_S, left_s) if left_s > 0 else TICK_S


def _look_at(
    run: _Load, sender: asyncio.Future[object], writer: asyncio.Task[None], stop: asyncio.Event | None
) -> None:
    """End the load when it is time."""
    _raise_failure(run, sender, writer)
    now_ns = run.now_ns()
    if stop is not None and stop.is_set():
        run.end(_INTERRUPTED)
    if (lost := run.tally.lost(now_ns)) is not None:
        run.end(Ending("partial", lost))
    if (ending := run.measured.advance(now_ns, answered=run.tally.answered)) is not None:
        run.end(ending)
    if sender.done():
        run.end(Ending("complete", "the trace is over"))


def _raise_failure(run: _Load, *tasks: asyncio.Future[Any]) -> None:
    """Raise what a task or an answer ended with that is no answer: a disk that is full, a defect of ours."""
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        # A gather that was cancelled has that for its exception.
        if error is not None and not isinstance(error, asyncio.CancelledError):
            raise error
    if run.failure is not None:
        raise run.failure


async def _drain(run: _Load, reports: _Reports) -> None:
    """Wait for the answers that are on their way, but not longer than the profile allows."""
    until_ns = run.now_ns() + round(run.drain_s * _NS)
    while run.answering and not run.interrupted and (left_ns := until_ns - run.now_ns()) > 0:
        await asyncio.wait(set(run.answering), timeout=min(TICK_S, left_ns / _NS))
        reports.tell("draining", latest_ns=until_ns)
        run.answering -= {task for task in run.answering if task.done()}


def _too_many(max_in_flight: int) -> str:
    return (
        f"server lost: more than max_in_flight={max_in_flight} requests waited for their answers; "
        "the server does not keep up with this rate"
    )
