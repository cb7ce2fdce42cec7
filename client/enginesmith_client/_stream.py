"""Answers that come in pieces, as iterators: for threads and for tasks.

A stream sends its request when it is first read, and ends it on the server when it is closed, left (``with``),
dropped or cancelled before its end. Knows nothing of tensors; ``_calls`` opens the request.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from enginesmith_client._answer import Answer
from enginesmith_client._errors import Cancelled, InvalidInput
from enginesmith_client._flow import Flow, run, run_async
from enginesmith_client._messages import Generation, InferReply, InferResult, TextDelta
from enginesmith_client._requests import result_from_reply

Item = TypeVar("Item")
_Self = TypeVar("_Self")


class Reading:
    """One request that is answered in pieces: what its flow, its reader and whoever closes it share."""

    def __init__(self) -> None:
        self.stream: Any = None
        """The ``ReplyStream`` or ``AsyncReplyStream``, once the request is sent; None where one reply is all."""
        self.answer: Answer | None = None
        """Of a text model, once its metadata is known."""
        self.begun = False
        self.closed = False
        """Nobody reads any more. Set before ``stream`` is looked at, so a request that is sent meanwhile ends too."""
        self.ended = False
        """The last reply was read."""
        self.whole: Generation | None = None
        """Of a text model, at the end."""

    def check_open(self) -> None:
        """Return if nobody closed the stream.

        Raises:
            Cancelled: somebody did, before its end.
        """
        if self.closed:
            raise Cancelled(
                "this stream was closed before its end", hint="ask again: one stream is one answer"
            )

    def check_unread(self) -> None:
        """Return if there may be something to read.

        Raises:
            InvalidInput: everything was read.
        """
        if self.ended:
            raise InvalidInput(
                "this stream was read to its end already",
                hint="keep what it gave (a text stream has it all in .generation), or ask again",
            )

    def read_item(self, reply: InferReply) -> Any:
        """What the reader gets for a reply."""
        result = result_from_reply(reply)
        return result if self.answer is None else self.answer.take(result)

    def end(self) -> None:
        """Note that the last reply was read."""
        self.check_open()
        if self.answer is not None:
            self.whole = self.answer.generation(streamed=True)
        self.ended = True

    def generation(self) -> Generation:
        """The whole answer.

        Raises:
            InvalidInput: the stream was not read to its end.
        """
        if self.whole is None:
            raise InvalidInput(
                "the whole answer is known only after the last piece", hint="read the stream to its end first"
            )
        return self.whole


Opening = Callable[[Reading], Flow["InferReply | None"]]
"""Sends the request of a reading; its first reply."""


def _shared() -> InvalidInput:
    return InvalidInput(
        "this stream is being read already",
        hint="read a stream from one thread or task, and others from others",
    )


class _Stream(Generic[Item], Iterator[Item]):
    """The answers to one request, for one thread at a time."""

    def __init__(self, opening: Opening) -> None:
        self._reading = Reading()
        self._opening = opening
        self._turn = threading.Lock()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __iter__(self: _Self) -> _Self:
        self._reading.check_unread()  # type: ignore[attr-defined]
        return self

    def __next__(self) -> Item:
        if not self._turn.acquire(blocking=False):
            raise _shared()
        try:
            return self._next()
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the request on the server, from any thread; after the end of the answer, or a second time, nothing."""
        reading = self._reading
        if not reading.ended:
            reading.closed = True
            if reading.stream is not None:
                reading.stream.close()

    def _next(self) -> Item:
        reading = self._reading
        if reading.ended:
            raise StopIteration
        reading.check_open()
        try:
            reply = self._receive(reading)
            if reply is not None:
                item: Item = reading.read_item(reply)
                return item
            reading.end()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def _receive(self, reading: Reading) -> InferReply | None:
        if not reading.begun:
            reading.begun = True
            return run(self._opening(reading))
        return None if reading.stream is None else reading.stream.receive()


class TextStream(_Stream[TextDelta]):
    """The pieces of one answer of a language model, as they come: iterate over it, in a ``with`` block if you may leave early."""

    @property
    def generation(self) -> Generation:
        """The whole answer, after the last piece; ``InvalidInput`` before that."""
        return self._reading.generation()


class ResultStream(_Stream[InferResult]):
    """The answers of a decoupled model to one request, as they come."""


class _AsyncStream(Generic[Item], AsyncIterator[Item]):
    """The answers to one request, for one task at a time. A task that is cancelled while it reads ends the request."""

    def __init__(self, opening: Opening) -> None:
        self._reading = Reading()
        self._opening = opening
        self._is_read = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self: _Self) -> _Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        reading = self._reading
        if reading.stream is not None and not (reading.ended or reading.closed) and self._loop is not None:
            reading.closed = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(_close_soon, self._loop, reading.stream)

    def __aiter__(self: _Self) -> _Self:
        self._reading.check_unread()  # type: ignore[attr-defined]
        return self

    async def __anext__(self) -> Item:
        if self._is_read:
            raise _shared()
        self._is_read = True
        try:
            return await self._next()
        finally:
            self._is_read = False

    async def close(self) -> None:
        """End the request on the server; after the end of the answer, or a second time, nothing."""
        reading = self._reading
        if not reading.ended:
            reading.closed = True
            if reading.stream is not None:
                await reading.stream.close()

    async def _next(self) -> Item:
        reading = self._reading
        if reading.ended:
            raise StopAsyncIteration
        reading.check_open()
        try:
            reply = await self._receive(reading)
            if reply is not None:
                item: Item = reading.read_item(reply)
                return item
            reading.end()
        except asyncio.CancelledError:
            if reading.closed and not _is_cancelled():
                # gRPC's way to tell the reader of a stream that another task has closed it.
                reading.check_open()
            await self.close()
            raise
        except BaseException:
            await self.close()
            raise
        raise StopAsyncIteration

    async def _receive(self, reading: Reading) -> InferReply | None:
        if not reading.begun:
            reading.begun = True
            self._loop = asyncio.get_running_loop()
            return await run_async(self._opening(reading))
        return None if reading.stream is None else await reading.stream.receive()


class AsyncTextStream(_AsyncStream[TextDelta]):
    """``TextStream`` for tasks."""

    @property
    def generation(self) -> Generation:
        """As ``TextStream.generation``."""
        return self._reading.generation()


class AsyncResultStream(_AsyncStream[InferResult]):
    """``ResultStream`` for tasks."""


def _is_cancelled() -> bool:
    """Whether somebody cancelled the current task, as far as Python tells (before 3.11 it does not)."""
    task = asyncio.current_task()
    return task is not None and sys.version_info >= (3, 11) and task.cancelling() > 0


def _close_soon(loop: asyncio.AbstractEventLoop, stream: Any) -> None:
    task = loop.create_task(stream.close())
    _CLOSING.add(task)
    task.add_done_callback(_CLOSING.discard)


_CLOSING: set[asyncio.Task[None]] = set()
"""A loop holds its tasks weakly; these have no other owner."""
