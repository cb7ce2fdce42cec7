"""The HTTP transport: Triton's HTTP/1.1 endpoint with binary tensor data, over kept-alive connections.

Uses the standard library's ``http.client`` and not ``tritonclient.http``: that one is bound to one thread by
gevent and has a timeout for each socket operation, where this client promises one for the whole call.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import http.client
import selectors
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, InvalidInput, error_from_status
from enginesmith_client._http_messages import HttpAnswer, http_from_operation, reply_from_http
from enginesmith_client._messages import InferRequest
from enginesmith_client._operations import Operation, described
from enginesmith_client._settings import ConnectionSettings
from enginesmith_client._transport import ReplyStream

_CHUNK_BYTES = 1 << 20


class HttpTransport:
    """Speaks KServe v2 with Triton's extensions over HTTP/1.1."""

    def __init__(self, address: Address, settings: ConnectionSettings) -> None:
        self._address = address
        self._settings = settings
        self._idle = _IdleConnections()

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        model = getattr(operation, "model", None) or None
        call = Call(str(self._address), described(operation), deadline.timeout_s, model)
        http_call = http_from_operation(operation)
        answer = self._exchange(
            http_call.method, http_call.path, call, deadline, body=http_call.body, headers=http_call.headers
        )
        return reply_from_http(operation, answer, call)

    def open(self, request: InferRequest, deadline: Deadline) -> ReplyStream:
        raise InvalidInput(
            f"model {request.model!r} is decoupled, which this client asks over gRPC only",
            hint="use a grpc:// address",
        )

    def close(self) -> None:
        self._idle.close()

    def _exchange(
        self,
        method: str,
        path: str,
        call: Call,
        deadline: Deadline,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        """One request and its answer; the connection is kept only when the answer was read to its end."""
        connection = self._idle.take() or http.client.HTTPConnection(self._address.host, self._address.port)
        complete = False
        try:
            answer = _round_trip(
                connection, method, self._address.base_path + path, deadline, body=body, headers=headers or {}
            )
            complete = connection.sock is not None
        except TimeoutError as error:
            raise error_from_status("deadline", str(error), call=call) from error
        except _NotConnected as error:
            raise error_from_status("unreachable", str(error), call=call) from error.__cause__
        except (OSError, http.client.HTTPException) as error:
            raise error_from_status("broken", _said(error), call=call) from error
        finally:
            if complete:
                self._idle.give(connection)
            else:
                connection.close()
        return answer


@dataclass
class _IdleConnections:
    """Connections that wait for their next request; shared between threads."""

    _connections: list[http.client.HTTPConnection] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def take(self) -> http.client.HTTPConnection | None:
        """A connection that the server has not closed meanwhile, or None.

        Looking first makes a retry needless: an inference that was perhaps begun is never sent twice.
        """
        while True:
            with self._lock:
                connection = self._connections.pop() if self._connections else None
            if connection is None or not _is_readable(connection.sock):
                return connection
            connection.close()

    def give(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if not self._closed:
                self._connections.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()


class _NotConnected(Exception):  # noqa: N818 - becomes a ConnectError
    """No connection was made, so that nothing was sent."""


def _round_trip(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    deadline: Deadline,
    *,
    body: bytes,
    headers: Mapping[str, str],
) -> HttpAnswer:
    if connection.sock is None:
        connection.timeout = deadline.remaining_s()
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            raise _NotConnected(_said(error)) from error
    sock: socket.socket = connection.sock
    sock.settimeout(deadline.remaining_s())
    connection.request(method, path, body=body or None, headers=dict(headers))
    sock.settimeout(deadline.remaining_s())
    response = connection.getresponse()
    chunks: list[bytes] = []
    while not response.isclosed():
        if deadline.expired:
            raise TimeoutError("the answer was still arriving")
        sock.settimeout(deadline.remaining_s())
        chunks.append(response.read1(_CHUNK_BYTES))
        if not chunks[-1]:
            break
    if response.length:
        raise http.client.IncompleteRead(b"".join(chunks), response.length)
    response.read()  # Nothing is left, but before Python 3.12 only this tells the connection so.
    return HttpAnswer(
        response.status, {name.lower(): value for name, value in response.getheaders()}, b"".join(chunks)
    )


def _said(error: Exception) -> str:
    if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
        return "what answered does not speak HTTP"
    return str(error) or type(error).__name__


def _is_readable(sock: socket.socket | None) -> bool:
    """Whether an idle socket has something to read, which can only be its end."""
    if sock is None:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(timeout=0))
