"""The HTTP transport: Triton's HTTP/1.1 endpoint with binary tensor data, over kept-alive connections.

Uses the standard library's ``http.client`` and not ``tritonclient.http``: that one is bound to one thread by
gevent and has a timeout for each socket operation, where this client promises one for the whole call.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import Call, InvalidInput, ServerError, Status, error_from_status
from enginesmith_client._messages import InferReply, InferRequest, Json, WireTensor

_HEADER_LENGTH = "Inference-Header-Content-Length"
_CHUNK_BYTES = 1 << 20
# Triton answers 400 for UNKNOWN, ALREADY_EXISTS and CANCELLED as well; HTTP cannot tell them apart.
_STATUSES: dict[int, Status] = {
    400: "invalid_argument",
    404: "not_found",
    408: "deadline",
    429: "unavailable",
    501: "unimplemented",
    503: "unavailable",
    504: "deadline",
}


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpTransport:
    """Speaks KServe v2 with Triton's extensions over HTTP/1.1."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle = _IdleConnections()

    def server_ready(self, deadline: Deadline) -> bool:
        call = self._describe("the readiness check", deadline)
        return self._exchange("GET", "/v2/health/ready", call, deadline).status == 200

    def model_ready(self, model: str, version: str, deadline: Deadline) -> bool:
        call = self._describe("the readiness check", deadline, model)
        return self._exchange("GET", _model_path(model, version) + "/ready", call, deadline).status == 200

    def metadata(self, model: str, version: str, deadline: Deadline) -> Json:
        call = self._describe("reading the metadata", deadline, model)
        return self._json("GET", _model_path(model, version), call, deadline)

    def config(self, model: str, version: str, deadline: Deadline) -> Json:
        call = self._describe("reading the configuration", deadline, model)
        return self._json("GET", _model_path(model, version) + "/config", call, deadline)

    def statistics(self, model: str, version: str, deadline: Deadline) -> Json:
        call = self._describe("reading the statistics", deadline, model)
        return self._json("GET", _model_path(model, version) + "/stats", call, deadline)

    def index(self, deadline: Deadline) -> Json:
        call = self._describe("reading the repository index", deadline)
        return self._json("POST", "/v2/repository/index", call, deadline)

    def infer(self, request: InferRequest, deadline: Deadline) -> InferReply:
        body, header_length = body_from_request(request)
        call = self._describe("inference", deadline, request.model)
        path = _model_path(request.model, request.version) + "/infer"
        answer = self._exchange(
            "POST", path, call, deadline, body=body, headers={_HEADER_LENGTH: str(header_length)}
        )
        _raise_for_status(answer, call)
        return reply_from_body(answer.body, answer.headers.get(_HEADER_LENGTH.lower()))

    def close(self) -> None:
        self._idle.close()

    def _describe(self, action: str, deadline: Deadline, model: str | None = None) -> Call:
        return Call(
            str(self._address), f"{action} of model {model!r}" if model else action, deadline.timeout_s, model
        )

    def _json(self, method: str, path: str, call: Call, deadline: Deadline) -> dict[str, Any]:
        answer = self._exchange(method, path, call, deadline)
        _raise_for_status(answer, call)
        try:
            value: Any = json.loads(answer.body)
        except ValueError as error:
            raise ServerError(
                f"{call.action}: the answer of {call.address} is not JSON: {answer.body[:80]!r}"
            ) from error
        # The repository index is a bare list over HTTP and has a name over gRPC.
        return {"models": value} if isinstance(value, list) else dict(value)

    def _exchange(
        self,
        method: str,
        path: str,
        call: Call,
        deadline: Deadline,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> _Answer:
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
        except (OSError, http.client.HTTPException) as error:
            raise error_from_status("unreachable", _said(error), call=call) from error
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


def _round_trip(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    deadline: Deadline,
    *,
    body: bytes,
    headers: Mapping[str, str],
) -> _Answer:
    if connection.sock is None:
        connection.timeout = deadline.remaining_s()
        connection.connect()
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
    return _Answer(
        response.status, {name.lower(): value for name, value in response.getheaders()}, b"".join(chunks)
    )


def body_from_request(request: InferRequest) -> tuple[bytes, int]:
    """The HTTP body of an inference, and the length of the JSON that comes before the tensor data in it."""
    header: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in request.inputs
        ],
        "parameters": {**request.parameters, "binary_data_output": True},
    }
    if request.id:
        header["id"] = request.id
    if request.outputs:
        asked = {"classification": request.classes} if request.classes else {}
        header["outputs"] = [
            {"name": name, "parameters": {"binary_data": True, **asked}} for name in request.outputs
        ]
    encoded = json.dumps(header, allow_nan=False).encode("utf-8")
    return b"".join([encoded, *(tensor.data for tensor in request.inputs)]), len(encoded)


def reply_from_body(body: bytes, header_length: str | None) -> InferReply:
    """The reply in the body of an answer whose JSON part is ``header_length`` long (all of it when None)."""
    end = int(header_length) if header_length is not None else len(body)
    try:
        header = json.loads(body[:end])
        outputs: list[WireTensor] = []
        for tensor in header["outputs"]:
            size_bytes = tensor["parameters"]["binary_data_size"]
            data = body[end : end + size_bytes]
            outputs.append(WireTensor(tensor["name"], tensor["datatype"], tuple(tensor["shape"]), data))
            end += size_bytes
        return InferReply(header["model_name"], header["model_version"], header.get("id", ""), tuple(outputs))
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"the answer to an inference cannot be read: {type(error).__name__}: {error}",
            hint="the server must support the binary tensor data extension, as Triton does",
        ) from error


def _model_path(model: str, version: str) -> str:
    # Triton does not decode percent escapes in a model's name, so a name that needs them has no URL.
    if quote(model, safe="!$&'()*+,;=:@") != model:
        raise InvalidInput(
            f"model name {model!r} cannot be part of an HTTP path", hint="use gRPC for this model"
        )
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


def _raise_for_status(answer: _Answer, call: Call) -> None:
    if answer.status == 200:
        return
    try:
        detail = str(json.loads(answer.body)["error"])
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP status {answer.status}: {answer.body[:200].decode('utf-8', 'replace')}"
    raise error_from_status(_STATUSES.get(answer.status, "internal"), detail, call=call)


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
