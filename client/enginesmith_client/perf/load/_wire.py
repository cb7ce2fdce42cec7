"""Requests out and answers in, as bytes over gRPC, with the moments at which that happened.

A generator's own work is in every latency that it measures, so nothing is done here that can be done before or later:
requests are serialized already, and an answer is read only as far as the figures need, when all of it is there. Times
are taken where bytes are given to the connection and where it gets them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from enginesmith_client._address import address_from_url
from enginesmith_client._errors import (
    Call,
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    ModelNotReady,
    Overloaded,
    ServerError,
    TritonClientError,
    error_from_status,
)
from enginesmith_client._grpc_messages import is_final, status_from_code, status_from_text
from enginesmith_client._settings import ConnectionSettings
from enginesmith_client.perf._records import OutcomeKind
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._grpc_connection import Exchange, GrpcConnection, Status
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_OUTCOMES: Final[Mapping[type[TritonClientError], OutcomeKind]] = {
    DeadlineExceeded: "deadline",
    Overloaded: "overloaded",
    ConnectError: "connect",
    ModelNotReady: "not_ready",
    InvalidInput: "invalid",
    ServerError: "server",
    Cancelled: "cancelled",
}
_INT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request. Times are absolute nanoseconds of the monotonic clock."""

    outcome: OutcomeKind
    error: str
    ended_ns: int
    """The last response, or the failure."""
    piece_ns: tuple[int, ...] = ()
    """When each response of a stream came that had outputs."""
    prompt_tokens: int | None = None
    """As the server counted them, as the next. None: it does not tell."""
    output_tokens: int | None = None
    """Of a stream that does not tell: its responses."""
    sent_ns: int = 0
    """When the connection took the request."""


class Wire:
    """A connection to the server of ``target``; it belongs to the event loop in which it was made.

    Raises:
        InvalidInput: the address is not one of gRPC, or a header cannot be sent.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout_s: float,
        headers: Mapping[str, str],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        address = address_from_url(target.url, "grpc")
        settings = ConnectionSettings(headers=headers)
        self._connection = GrpcConnection(address, timeout_s=timeout_s, headers=settings.headers, clock=clock)
        self._call = Call(str(address), f"inference of model {target.model!r}", timeout_s, target.model)

    async def connect(self, *, timeout_s: float) -> bool:
        """Whether the server could be reached in time; connecting is then in no request's latency."""
        return await self._connection.connect(timeout_s=timeout_s)

    def send(self, request: Prepared) -> Coroutine[Any, Any, Answer]:
        """Send ``request`` and give what is to be awaited for its answer. Failures are answers as well."""
        # A stream of requests with one request in it looks the same to the server as a single request.
        method = _STREAM if request.streaming else _INFER
        exchange = self._connection.call(method, request.message)
        return self._answer(exchange, request)

    async def close(self) -> None:
        """Close the connection; requests that have no answer yet are cancelled."""
        await self._connection.close()

    async def _answer(self, exchange: Exchange, request: Prepared) -> Answer:
        status = await self._over(exchange)
        read = self._pieces if request.streaming else self._whole
        try:
            return read(exchange, status, request.counts)
        except DecodeError as error:
            # Words that are not UTF-8, for example: protobuf reads no message with them.
            return self._failed(
                error_from_status("internal", f"the answer cannot be read: {error}", call=self._call),
                exchange,
            )
        finally:
            # The connection knows the call until its time-out is over, and answers may be large.
            exchange.came.clear()

    def _whole(self, exchange: Exchange, status: Status, counts: TokenCounts) -> Answer:
        if status.code != 0 or not exchange.came:
            return self._failed(self._error(status), exchange)
        came_ns, message = exchange.came[-1]
        prompt_tokens = output_tokens = None
        if counts.prompt_output is not None or counts.answer_output is not None:
            reply = service_pb2.ModelInferResponse.FromString(message)
            prompt_tokens = _count(reply, counts.prompt_output)
            output_tokens = _count(reply, counts.answer_output)
        return Answer("ok", "", came_ns, (), prompt_tokens, output_tokens, exchange.sent_ns)

    def _pieces(self, exchange: Exchange, status: Status, counts: TokenCounts) -> Answer:
        pieces, came_ns = _Pieces(counts), 0
        for came_ns, message in exchange.came:
            answer = service_pb2.ModelStreamInferResponse.FromString(message)
            if answer.error_message:
                text = answer.error_message
                return self._failed(
                    error_from_status(status_from_text(text), text, call=self._call),
                    exchange,
                    pieces,
                    came_ns,
                )
            pieces.add(answer.infer_response, came_ns)
        if not pieces.complete:
            return self._failed(self._error(status), exchange, pieces)
        return Answer(
            "ok", "", came_ns, tuple(pieces.came_ns), pieces.prompt_tokens, pieces.output_tokens, exchange.sent_ns
        )  # fmt: skip

    async def _over(self, exchange: Exchange) -> Status:
        try:
            return await exchange.over
        except asyncio.CancelledError:
            exchange.cancel()
            raise

    def _error(self, status: Status) -> TritonClientError:
        if status.code is None:
            return error_from_status(
                "unreachable" if status.unsent else "broken", status.words, call=self._call
            )
        if status.code == 0:
            return error_from_status("broken", "the stream ended before its last answer", call=self._call)
        return error_from_status(status_from_code(status.code), status.words, call=self._call)

    def _failed(
        self,
        error: TritonClientError,
        exchange: Exchange,
        pieces: _Pieces | None = None,
        ended_ns: int | None = None,
    ) -> Answer:
        return Answer(
            _OUTCOMES[type(error)],
            error.message,
            exchange.ended_ns if ended_ns is None else ended_ns,
            tuple(pieces.came_ns) if pieces else (),
            pieces.prompt_tokens if pieces else None,
            pieces.output_tokens if pieces else None,
            exchange.sent_ns,
        )


class _Pieces:
    """The responses of one stream so far."""

    __slots__ = ("_counts", "came_ns", "complete", "output_tokens", "prompt_tokens")

    def __init__(self, counts: TokenCounts) -> None:
        self._counts = counts
        self.came_ns: list[int] = []
        self.complete = False
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None

    def add(self, reply: Any, came_ns: int) -> None:
        """One response; a last one without outputs is no piece."""
        self.complete = is_final(reply)
        if not reply.outputs:
            return
        self.came_ns.append(came_ns)
        counts = self._counts
        if self.prompt_tokens is None:
            self.prompt_tokens = _count(reply, counts.prompt_output)
        if counts.answer_output is None:
            self.output_tokens = len(self.came_ns) if counts.pieces_are_tokens else None
            return
        count = _count(reply, counts.answer_output)
        if count is not None:
            self.output_tokens = count + (self.output_tokens or 0) if counts.counts_pieces else count


def _count(reply: Any, output: str | None) -> int | None:
    """The first element of an INT32 output of a ``ModelInferResponse``; None where it has no such output."""
    if output is None:
        return None
    for tensor, data in zip(reply.outputs, reply.raw_output_contents, strict=False):
        if tensor.name == output and len(data) >= _INT32_BYTES:
            return int.from_bytes(data[:_INT32_BYTES], "little", signed=True)
    return None
