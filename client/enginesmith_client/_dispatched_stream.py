"""A stream of answers that goes on to another server, or tries again, as long as nothing of its answer is there.

After the first answer nothing is ever sent again: what the caller has read cannot be taken back.
"""

from __future__ import annotations

import inspect
import threading
from typing import TYPE_CHECKING, Any

from enginesmith_client._attempts import Attempts, Rules
from enginesmith_client._deadline import Deadline
from enginesmith_client._endpoints import Endpoint
from enginesmith_client._errors import TritonClientError
from enginesmith_client._flow import CloseStream, Flow, Open, Receive, run
from enginesmith_client._messages import InferReply, InferRequest

if TYPE_CHECKING:
    from enginesmith_client._dispatched_stream_aio import AsyncDispatchedStream


class StreamFlows:
    """The answers to one request, from one server after the other until the first answer is there."""

    def __init__(self, rules: Rules, attempts: Attempts, request: InferRequest, deadline: Deadline) -> None:
        self._rules = rules
        self._attempts = attempts
        self._request = request
        self._deadline = deadline
        self._lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._inner: Any = None
        self._answered = False
        self._last: InferReply | None = None
        self._closed = False
        self._counted = False

    def open(self) -> Flow[None]:
        """Send the request."""
        self._rules.running.begin()
        self._counted = True
        try:
            yield from self._open()
        except BaseException:
            self._let_go()
            raise

    def receive(self) -> Flow[InferReply | None]:
        """The next answer, or None after the last or after ``close``."""
        while not self._closed:
            try:
                reply = yield Receive(self._inner)
            except TritonClientError as error:
                failure = error
            except BaseException:
                # The task was cancelled: whoever reads may never come back to close this.
                self._let_go()
                raise
            else:
                self._received(reply)
                return reply  # type: ignore[no-any-return]
            yield from self._recover(failure)
        return None

    def close(self) -> Flow[None]:
        """End the request."""
        self._closed = True
        self._let_go()
        if self._inner is not None:
            yield CloseStream(self._inner)

    def shell(self) -> DispatchedStream | AsyncDispatchedStream:
        """This stream for who reads it: threads or tasks, as the transport's own is."""
        if inspect.iscoroutinefunction(self._inner.receive):
            from enginesmith_client._dispatched_stream_aio import AsyncDispatchedStream

            return AsyncDispatchedStream(self)
        return DispatchedStream(self)

    def _open(self) -> Flow[None]:
        while True:
            endpoint = self._attempts.take() or (yield from self._attempts.wait_and_take())
            self._endpoint = endpoint
            try:
                self._inner = yield Open(endpoint.transport, self._request, self._deadline)
            except TritonClientError as error:
                failure = error
            else:
                break
            self._release()
            yield from self._attempts.failed(endpoint, failure)
        if self._closed:
            yield from self.close()

    def _recover(self, failure: TritonClientError) -> Flow[None]:
        """Send the request again if nothing of its answer is there yet; else raise what ended it."""
        endpoint = self._endpoint
        self._release()
        try:
            if self._answered or self._closed or endpoint is None:
                if endpoint is not None:
                    self._attempts.note(endpoint, failure)
                if self._rules.running.is_cut:
                    raise self._rules.running.closed_error() from failure
                raise failure
            yield from self._attempts.failed(endpoint, failure)
            if not self._closed:
                yield from self._open()
        except BaseException:
            self._let_go()
            raise

    def _received(self, reply: InferReply | None) -> None:
        endpoint = self._endpoint
        if not self._answered and endpoint is not None:
            self._answered = True
            self._attempts.answered(endpoint, None)
        if reply is None:
            self._let_go()
        else:
            self._last = reply

    def _release(self) -> None:
        with self._lock:
            endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            self._rules.endpoints.release(endpoint)

    def _let_go(self) -> None:
        """Count the request as over, once."""
        self._release()
        with self._lock:
            counted, self._counted = self._counted, False
        if counted:
            self._rules.running.end()
            if self._last is not None:
                # Its counts are those of the whole answer so far, also when it was left before its end.
                self._attempts.settle(self._last)


class DispatchedStream:
    """A ``ReplyStream`` whose request is tried again until its first answer."""

    def __init__(self, stream: StreamFlows) -> None:
        self._stream = stream

    def receive(self) -> InferReply | None:
        return run(self._stream.receive())

    def close(self) -> None:
        run(self._stream.close())
