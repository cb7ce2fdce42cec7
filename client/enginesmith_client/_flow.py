"""Calls without input and output: a *flow* is a generator that yields steps and is sent their results.

So every call is written once, and threads and tasks share it: ``run`` does the steps and waits, ``run_async`` of
``_flow_aio`` awaits them. An error of a step is thrown into the flow, which may catch it. A flow never blocks by itself.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import TritonClientError
from enginesmith_client._messages import InferRequest
from enginesmith_client._operations import Operation
from enginesmith_client._signal import Signal


@dataclass(frozen=True, slots=True)
class Send:
    """Perform an operation. Result: its reply."""

    transport: Any
    """A ``Transport`` in threads, an ``AsyncTransport`` in tasks; flows only pass it on."""
    operation: Operation
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Open:
    """Send a request to a decoupled model. Result: a ``ReplyStream`` or ``AsyncReplyStream``."""

    transport: Any
    request: InferRequest
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for the next answer of a stream. Result: an ``InferReply``, or None after the last."""

    stream: Any


@dataclass(frozen=True, slots=True)
class CloseStream:
    """End a stream. Result: None."""

    stream: Any


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait. Result: None."""

    seconds: float
    until: Signal | None = None
    """Ends the waiting early when it is set."""


@dataclass(frozen=True, slots=True)
class Together:
    """Run flows at the same time, at most ``at_once``. Result: the list of their results; the first error ends it."""

    flows: Sequence[Flow[Any]]
    at_once: int


Step: TypeAlias = "Send | Open | Receive | CloseStream | Pause | Together"
Result = TypeVar("Result")
Flow: TypeAlias = Generator[Step, Any, Result]


def run(flow: Flow[Result]) -> Result:
    """The result of ``flow``, its steps done in this thread."""
    try:
        step = next(flow)
        while True:
            try:
                result = _act(step)
            except TritonClientError as error:
                step = flow.throw(error)
            else:
                step = flow.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        flow.close()


def _act(step: Step) -> Any:
    if isinstance(step, Send):
        return step.transport.perform(step.operation, step.deadline)
    if isinstance(step, Receive):
        try:
            return step.stream.receive()
        except BaseException:  # An interrupt too leaves nobody who would read on.
            step.stream.close()
            raise
    if isinstance(step, Open):
        return step.transport.open(step.request, step.deadline)
    if isinstance(step, Pause):
        return time.sleep(step.seconds) if step.until is None else step.until.wait(step.seconds)
    if isinstance(step, CloseStream):
        return step.stream.close()
    return _together(step)


def _together(step: Together) -> list[Any]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(step.at_once, len(step.flows))) as pool:
        answers = [pool.submit(run, flow) for flow in step.flows]
        try:
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()
