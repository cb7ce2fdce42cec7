"""Answers that come in pieces, as iterators for threads; ``_stream_aio`` has those for tasks.

A stream sends its request when it is first read, and ends it on the server when it is closed, left (``with``),
dropped or cancelled before its end. Knows nothing of tensors; ``_calls`` opens the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from enginesmith_client._answer import Answer
from enginesmith_client._errors import Cancelled, InvalidInput
from enginesmith_client._flow import Flow, run
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


def shared_error() -> InvalidInput:
    """The error of a second reader."""
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
            raise shared_error()
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
