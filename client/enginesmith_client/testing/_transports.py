"""The transports of the fake server: what the clients of it perform their operations with. No sockets, no waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from typing import Any

from enginesmith_client._deadline import Deadline
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Operation
from enginesmith_client.testing._backend import Backend, RecordedRequest


class FakeReplyStream:
    """The answers to one request; each is made when it is received."""

    def __init__(self, record: RecordedRequest, replies: Generator[InferReply, None, None]) -> None:
        self._record = record
        self._replies = replies
        self._lock = threading.Lock()

    def receive(self) -> InferReply | None:
        with self._lock:
            return next(self._replies, None)

    def close(self) -> None:
        with self._lock:
            self._record.cancelled = self._record.cancelled or not self._record.ended
            self._record.ended = True
            self._replies.close()


class AsyncFakeReplyStream:
    """The same for tasks; other tasks run between the answers."""

    def __init__(self, stream: FakeReplyStream) -> None:
        self._stream = stream

    async def receive(self) -> InferReply | None:
        await asyncio.sleep(0)
        return self._stream.receive()

    async def close(self) -> None:
        self._stream.close()


class FakeTransport:
    """A ``Transport`` to a fake server."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        return self._backend.perform(operation, deadline)

    def open(self, request: InferRequest, deadline: Deadline) -> FakeReplyStream:
        return FakeReplyStream(*self._backend.stream(request, deadline))

    def close(self) -> None:
        """There is nothing to let go of."""


class AsyncFakeTransport:
    """An ``AsyncTransport`` to a fake server; other tasks run before each answer."""

    def __init__(self, backend: Backend) -> None:
        self._transport = FakeTransport(backend)

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        await asyncio.sleep(0)
        return self._transport.perform(operation, deadline)

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncFakeReplyStream:
        await asyncio.sleep(0)
        return AsyncFakeReplyStream(self._transport.open(request, deadline))

    async def close(self) -> None:
        """There is nothing to let go of."""
