"""The seam between what the client says and how it travels.

A transport carries messages to one server and nothing else: it checks no shapes, caches nothing and never retries. It
turns every failure into an error of ``_errors``, and it is over when the deadline is, whatever the server does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from enginesmith_client import _address
from enginesmith_client._address import Address
from enginesmith_client._deadline import Deadline
from enginesmith_client._messages import InferReply, InferRequest
from enginesmith_client._operations import Operation
from enginesmith_client._settings import ConnectionSettings


class ReplyStream(Protocol):
    """The answers of a decoupled model to one request, as they come. For one thread at a time."""

    def receive(self) -> InferReply | None:
        """The next answer, or None after the last. Raises what ended the stream otherwise, the deadline among it."""

    def close(self) -> None:
        """End the request: the server is told that nobody waits for the rest. May be called more than once, by any thread."""


class AsyncReplyStream(Protocol):
    """``ReplyStream`` for tasks; a task cancelled in ``receive`` must still close it."""

    async def receive(self) -> InferReply | None:
        """As ``ReplyStream.receive``."""

    async def close(self) -> None:
        """As ``ReplyStream.close``."""


class Transport(Protocol):
    """One way to reach one server. Safe to use from several threads at once; connects when first used."""

    def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """The reply that ``_operations`` promises for the operation."""

    def open(self, request: InferRequest, deadline: Deadline) -> ReplyStream:
        """Send the request to a decoupled model. Errors may come here or from the first ``receive``."""

    def close(self) -> None:
        """Let go of every connection and end what is running. May be called more than once."""


class AsyncTransport(Protocol):
    """``Transport`` for the tasks of one event loop."""

    async def perform(self, operation: Operation, deadline: Deadline) -> Any:
        """As ``Transport.perform``."""

    async def open(self, request: InferRequest, deadline: Deadline) -> AsyncReplyStream:
        """As ``Transport.open``."""

    async def close(self) -> None:
        """As ``Transport.close``."""


def _grpc(address: Address, settings: ConnectionSettings) -> Transport:
    from enginesmith_client._grpc import GrpcTransport

    return GrpcTransport(address, settings)


def _http(address: Address, settings: ConnectionSettings) -> Transport:
    from enginesmith_client._http import HttpTransport

    return HttpTransport(address, settings)


def _grpc_aio(address: Address, settings: ConnectionSettings) -> AsyncTransport:
    from enginesmith_client._grpc_aio import AsyncGrpcTransport

    return AsyncGrpcTransport(address, settings)


def _http_aio(address: Address, settings: ConnectionSettings) -> AsyncTransport:
    from enginesmith_client._http_aio import AsyncHttpTransport

    return AsyncHttpTransport(address, settings)


TRANSPORTS: dict[_address.Protocol, Callable[[Address, ConnectionSettings], Transport]] = {
    "grpc": _grpc,
    "http": _http,
}
"""How to make the transport of each protocol; each imports its library only when it is wanted."""

ASYNC_TRANSPORTS: dict[_address.Protocol, Callable[[Address, ConnectionSettings], AsyncTransport]] = {
    "grpc": _grpc_aio,
    "http": _http_aio,
}
"""The same for tasks."""
