"""Requests out and answers in, as bytes over gRPC, with the moments at which that happened.

A generator's own work is in every latency that it measures, so nothing is done here that can be done before or later:
requests are serialized already, and an answer is read only as far as the figures need. Times are taken where gRPC asks
for the bytes to send and where it hands over those that came, which is as near to the wire as Python gets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
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
from enginesmith_client._grpc_messages import (
    channel_credentials,
    channel_options,
    error_from_rpc,
    is_final,
    status_from_text,
)
from enginesmith_client._settings import ConnectionSettings, Tls
from enginesmith_client.perf._records import OutcomeKind
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts

_SERVICE = "/inference.GRPCInferenceService/"
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
_CLOSE_S = 1.0
_LAST_EVENTS_S = 0.05


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
    """When gRPC took the request."""


class _Outgoing:
    """A request on its way to gRPC."""

    __slots__ = ("message", "sent_ns")

    def __init__(self, message: bytes, now_ns: int) -> None:
        self.message = message
        self.sent_ns = now_ns


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
        settings = ConnectionSettings(headers=headers, tls=Tls() if address.encrypted else None)
        options = channel_options(settings)
        self._channel: Any = (
            grpc.aio.secure_channel(address.authority, channel_credentials(Tls()), options)
            if address.encrypted
            else grpc.aio.insecure_channel(address.authority, options)
        )
        self._ending: set[asyncio.Future[Any]] = set()
        """Streams of which all is read but the status."""
        self._clock = clock
        self._timeout_s = timeout_s
        self._metadata = tuple(settings.headers.items()) or None
        self._call = Call(str(address), f"inference of model {target.model!r}", timeout_s, target.model)
        self._infer = self._channel.unary_unary(f"{_SERVICE}ModelInfer", self._taken, self._came)
        # A stream of requests with one request in it looks the same to the server, and is one task more in here.
        self._stream = self._channel.unary_stream(f"{_SERVICE}ModelStreamInfer", self._taken, self._came)

    async def connect(self, *, timeout_s: float) -> bool:
        """Whether the server could be reached in time; connecting is then in no request's latency."""
        ready = asyncio.ensure_future(self._channel.channel_ready())
        await asyncio.wait({ready}, timeout=timeout_s)
        ready.cancel()
        return ready.done() and not ready.cancelled()

    def send(self, request: Prepared) -> Coroutine[Any, Any, Answer]:
        """Send ``request`` and give what is to be awaited for its answer. Failures are answers as well."""
        outgoing = _Outgoing(request.message, self._clock())
        send = self._stream if request.streaming else self._infer
        try:
            call = send(outgoing, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.UsageError as error:  # How grpcio says that the channel was closed.
            return self._refused(outgoing, str(error))
        finish = self._pieces if request.streaming else self._whole
        return finish(call, outgoing, request.counts)

    async def close(self) -> None:
        """Close the connection; requests that have no answer yet are cancelled."""
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=_CLOSE_S)
        await self._channel.close()
        # grpcio gives the last events of what was cancelled to the event loop of the call even if that is closed by
        # then, which the loop reports as an error; seen with 1.85.
        await asyncio.sleep(_LAST_EVENTS_S)

    def _taken(self, outgoing: _Outgoing) -> bytes:
        """The serializer: gRPC calls it right before it sends."""
        outgoing.sent_ns = self._clock()
        return outgoing.message

    def _came(self, message: bytes) -> tuple[int, bytes]:
        """The deserializer: gRPC calls it when a response is there, before whoever waits for it runs."""
        return self._clock(), message

    async def _refused(self, outgoing: _Outgoing, detail: str) -> Answer:
        return self._failed(error_from_status("cancelled", detail, call=self._call), outgoing)

    async def _whole(self, call: Any, outgoing: _Outgoing, counts: TokenCounts) -> Answer:
        try:
            ended_ns, message = await call
        except grpc.RpcError as error:
            return self._failed(error_from_rpc(error, self._call), outgoing)
        prompt_tokens = output_tokens = None
        if counts.prompt_output is not None or counts.answer_output is not None:
            reply = service_pb2.ModelInferResponse.FromString(message)
            prompt_tokens = _count(reply, counts.prompt_output)
            output_tokens = _count(reply, counts.answer_output)
        return Answer("ok", "", ended_ns, (), prompt_tokens, output_tokens, outgoing.sent_ns)

    async def _pieces(self, call: Any, outgoing: _Outgoing, counts: TokenCounts) -> Answer:
        pieces = _Pieces(counts)
        try:
            while not pieces.complete:
                came = await call.read()
                if came is grpc.aio.EOF:
                    raise error_from_status(
                        "broken", "the stream ended before its last answer", call=self._call
                    )
                came_ns, message = came
                answer = service_pb2.ModelStreamInferResponse.FromString(message)
                if answer.error_message:
                    text = answer.error_message
                    raise error_from_status(status_from_text(text), text, call=self._call)
                pieces.add(answer.infer_response, came_ns)
        except grpc.RpcError as error:
            return self._failed(error_from_rpc(error, self._call), outgoing, pieces)
        except TritonClientError as error:
            return self._failed(error, outgoing, pieces)
        finally:
            self._end(call, complete=pieces.complete)
        return Answer(
            "ok", "", came_ns, tuple(pieces.came_ns), pieces.prompt_tokens, pieces.output_tokens, outgoing.sent_ns
        )  # fmt: skip

    def _end(self, call: Any, *, complete: bool) -> None:
        """Let go of a stream. The server ends one that is complete; that is nothing that its caller waits for."""
        if call.done():
            return
        if not complete:
            call.cancel()
            return
        ending = asyncio.ensure_future(call.code())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _failed(self, error: TritonClientError, outgoing: _Outgoing, pieces: _Pieces | None = None) -> Answer:
        return Answer(
            _OUTCOMES[type(error)],
            error.message,
            self._clock(),
            tuple(pieces.came_ns) if pieces else (),
            pieces.prompt_tokens if pieces else None,
            pieces.output_tokens if pieces else None,
            outgoing.sent_ns,
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
            self.output_tokens = len(self.came_ns)
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
