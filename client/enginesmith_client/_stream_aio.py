"""Answers that come in pieces, as asynchronous iterators for tasks."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from enginesmith_client._flow_aio import run_async
from enginesmith_client._messages import Generation, InferReply, InferResult, TextDelta
from enginesmith_client._stream import Item, Opening, Reading, shared_error

_Self = TypeVar("_Self")


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
            raise shared_error()
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
