"""The HTTP transport: Triton's HTTP/1.1 endpoint with binary tensor data, over kept-alive connections.

Uses the standard library's ``http.client`` and not ``tritonclient.http``: that one is bound to one thread by
gevent and has a timeout for each socket operation, where this client promises one for the whole call.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import http.client
import threading
from collections import deque
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, TritonClientError, error_from_status
from enginesmith_client._flow import run
from enginesmith_client._http_encoding import compressed, decompressed
from enginesmith_client._http_events import (
    EventReader,
    http_from_stream_request,
    raise_for_stream_status,
    reply_from_event,
)
from enginesmith_client._http_messages import HttpAnswer, HttpCall, http_from_operation, reply_from_http
from enginesmith_client._http_sockets import Connection, ConnectionPool, NotConnectedError, limited
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Infer, Operation, described
from enginesmith_client._process import OwnProcess
from enginesmith_client._settings import ConnectionSettings, Tls, ssl_context
from enginesmith_client._sharing import shared_memory_over

_CHUNK_BYTES = 1 << 16
_LARGE_CHUNK_BYTES = 1 << 20


class HttpTransport:
    """Speaks KServe v2 with Triton's extensions over HTTP/1.1."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._process = OwnProcess()
        self._wire = _Wire(address, settings)
        self._memory = shared_memory_over(self._wire, settings)

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """As ``Transport.perform``."""
        self._process.require()
        if self._memory is not None and type(operation) is Infer:
            return run(self._memory.infer(operation, deadline))
        return self._wire.perform(operation, deadline)

    def open(self, request: InferRequest, deadline: Deadline) -> HttpReplyStream:
        """As ``Transport.open``."""
        self._process.require()
        return self._wire.open(request, deadline)

    def close(self) -> None:
        """As ``Transport.close``; in a child of the process nothing happens, what there is belongs to the parent."""
        if not self._process.is_this:
            return
        if self._memory is not None:
            run(self._memory.release())
        self._wire.close()


class _Wire:
    """The connections, and how operations go over them."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        encrypted = address.encrypted or settings.tls is not None
        tls = settings.tls or Tls()
        context = limited(ssl_context(tls)) if encrypted else None
        self._name = f"http{'s' if encrypted else ''}://{address.authority}{address.base_path}"
        self._base_path = address.base_path
        self._settings = settings
        self._connections = ConnectionPool(address, context, tls.server_name)

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        call = call_of(self._name, operation, deadline)
        http_call = compressed(http_from_operation(operation), self._settings.compression)
        connection = self._connections.take()
        try:
            response = self._ask(connection, http_call, deadline)
            answer = HttpAnswer(response.status, _headers(response), _body(response))
        except BaseException as error:
            self._connections.drop(connection)
            raise self._failure(error, call) from error
        self._connections.give_back(connection)
        return reply_from_http(operation, decompressed(answer), call)

    def open(self, request: InferRequest, deadline: Deadline) -> HttpReplyStream:
        call = call_of(self._name, Infer(request), deadline)
        http_call = http_from_stream_request(request)
        connection = self._connections.take()
        try:
            response = self._ask(connection, http_call, deadline)
            refusal = None if response.status == 200 else _body(response)
        except BaseException as error:
            self._connections.drop(connection)
            raise self._failure(error, call) from error
        if refusal is not None:
            self._connections.give_back(connection)
            raise_for_stream_status(HttpAnswer(response.status, _headers(response), refusal), call)
        return HttpReplyStream(connection, response, request, call=call, wire=self)

    def end(self, connection: Connection, *, complete: bool) -> None:
        """A stream is over; its connection is kept when its answer was read to the end."""
        if complete:
            self._connections.give_back(connection)
        else:
            connection.abort()
            self._connections.drop(connection)

    def failure(self, error: Exception, call: Call) -> TritonClientError:
        """What an exception of the standard library means."""
        if self._connections.closed:
            return error_from_status("cancelled", "the client was closed", call=call)
        if isinstance(error, TimeoutError):
            return error_from_status("deadline", str(error), call=call)
        if isinstance(error, NotConnectedError):
            return error_from_status("unreachable", str(error), call=call)
        return error_from_status("broken", _said(error), call=call)

    def close(self) -> None:
        self._connections.close()

    def _ask(
        self, connection: Connection, http_call: HttpCall, deadline: Deadline
    ) -> http.client.HTTPResponse:
        connection.limit(deadline)
        headers = {**self._settings.headers, **http_call.headers}
        connection.request(
            http_call.method, self._base_path + http_call.path, http_call.body or None, headers
        )
        return connection.getresponse()

    def _failure(self, error: BaseException, call: Call) -> BaseException:
        known = isinstance(error, (OSError, http.client.HTTPException, NotConnectedError))
        return self.failure(error, call) if known and isinstance(error, Exception) else error


class HttpReplyStream:
    """The answers to one request."""

    def __init__(
        self,
        connection: Connection,
        response: http.client.HTTPResponse,
        request: InferRequest,
        *,
        call: Call,
        wire: _Wire,
    ) -> None:
        self._connection = connection
        self._response = response
        self._request = request
        self._call = call
        self._wire = wire
        self._reader = EventReader()
        self._events: deque[bytes] = deque()
        self._ended = threading.Lock()
        """Held from the end on: whoever gets it ends the stream."""

    def receive(self) -> InferReply | None:
        """As ``ReplyStream.receive``."""
        if self._ended.locked():
            return None
        try:
            event = self._next_event()
            reply = None if event is None else reply_from_event(event, self._request, self._call)
        except (OSError, http.client.HTTPException) as error:
            if self._ended.locked():
                return None
            self._end(complete=False)
            raise self._wire.failure(error, self._call) from error
        except (AttributeError, ValueError):
            # http.client's own, where close() in another thread took the file away while this one was between its lines.
            if self._ended.locked():
                return None
            self._end(complete=False)
            raise
        except BaseException:
            self._end(complete=False)
            raise
        if reply is None:
            self._end(complete=not self._reader.in_an_event)
        return reply

    def close(self) -> None:
        """As ``ReplyStream.close``. Triton notices it when it next sends something."""
        self._end(complete=False)

    def _next_event(self) -> bytes | None:
        while not self._events:
            data = self._response.read1(_CHUNK_BYTES)
            if not data:
                if self._reader.in_an_event:
                    raise http.client.IncompleteRead(b"")
                return None
            self._events += self._reader.feed(data)
        return self._events.popleft()

    def _end(self, *, complete: bool) -> None:
        if self._ended.acquire(blocking=False):
            self._wire.end(self._connection, complete=complete)


def call_of(address: str, operation: Operation, deadline: Deadline) -> Call:
    """The operation, for messages."""
    model = getattr(operation, "model", None) or None
    return Call(address, described(operation), deadline.timeout_s, model)


def _headers(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def _body(response: http.client.HTTPResponse) -> bytes:
    """The body, in pieces: ``read`` would reserve as much memory as the server says that it will send."""
    pieces = []
    while piece := response.read1(_LARGE_CHUNK_BYTES):
        pieces.append(piece)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    response.read()  # Nothing is left, but before Python 3.12 only this tells the connection so.
    return b"".join(pieces)


def _said(error: Exception) -> str:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return "what answered does not speak HTTP"
    return str(error) or type(error).__name__
